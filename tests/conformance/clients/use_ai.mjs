// npm packages "ai" (with its OpenAI-compatible provider) and "openai".
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "expertmesh",
  baseURL: `${url}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const prompt = "Who is there?";

const whole = await generateText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
assert.ok(["stop", "length"].includes(whole.finishReason));
assert.ok(whole.usage.outputTokens <= 8);

const stream = streamText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
let text = "";
for await (const part of stream.textStream) text += part;
assert.ok(text.length > 0);
assert.ok((await stream.usage).outputTokens > 0);

const schema = jsonSchema({
  type: "object",
  properties: { word: { type: "string", enum: ["king", "queen"] } },
  required: ["word"],
  additionalProperties: false,
});
const tools = { look_up: tool({ description: "Looks a word up.", inputSchema: schema }) };
const providerOptions = { expertmesh: { parallel_tool_calls: false } };
const asked = { model, prompt, tools, toolChoice: "required", providerOptions, maxRetries: 0 };
for (const calls of [(await generateText(asked)).toolCalls, await streamText(asked).toolCalls]) {
  assert.equal(calls[0].toolName, "look_up");
  assert.ok(["king", "queen"].includes(calls[0].input.word));
}
const picked = await generateObject({ model, prompt, schema, maxRetries: 0 });
assert.ok(["king", "queen"].includes(picked.object.word));
await assert.rejects(
  generateText({ model: provider("other"), prompt, maxRetries: 0 }),
  (error) => error.statusCode === 404 && /does not exist/.test(error.message),
);

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const parts = await client.chat.completions.create({
  model: name,
  messages: [{ role: "user", content: prompt }],
  max_tokens: 8,
  stream: true,
  stream_options: { include_usage: true },
});
let last;
for await (const part of parts) last = part;
assert.deepEqual(last.choices, []);
assert.ok(last.usage.completion_tokens > 0);
assert.equal((await client.embeddings.create({ model: name, input: "a" })).data.length, 1);
