// npm packages "@anthropic-ai/sdk", and "ai" with its Anthropic provider.
import assert from "node:assert/strict";
import Anthropic, { NotFoundError } from "@anthropic-ai/sdk";
import { createAnthropic } from "@ai-sdk/anthropic";
import { generateText, jsonSchema, streamText, tool } from "ai";

const [url, name] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const prompt = "Who is there?";
const asked = { model: name, messages: [{ role: "user", content: prompt }] };
const properties = { word: { type: "string", enum: ["king", "queen"] } };
const schema = { type: "object", properties, required: ["word"], additionalProperties: false };

const message = await client.messages.create({ ...asked, system: "Be brief.", max_tokens: 8 });
assert.ok(["end_turn", "max_tokens"].includes(message.stop_reason));
assert.ok(message.usage.output_tokens <= 8);
const count = await client.messages.countTokens({ ...asked, system: "Be brief." });
const { input_tokens, cache_read_input_tokens } = message.usage;
assert.equal(count.input_tokens, input_tokens + cache_read_input_tokens);

const same = { ...asked, max_tokens: 8, temperature: 0 };
const whole = await client.messages.create(same);
const stream = client.messages.stream(same);
let text = "";
stream.on("text", (piece) => (text += piece));
const final = await stream.finalMessage();
assert.equal(text, whole.content.map((block) => block.text).join(""));
assert.equal(final.usage.output_tokens, whole.usage.output_tokens);

const tools = [{ name: "look_up", description: "Looks a word up.", input_schema: schema }];
const tool_choice = { type: "any", disable_parallel_tool_use: true };
const calling = { ...asked, tools, tool_choice, max_tokens: 300 };
const streamed = await client.messages.stream(calling).finalMessage();
for (const answer of [await client.messages.create(calling), streamed]) {
  assert.equal(answer.stop_reason, "tool_use");
  const call = answer.content.find((block) => block.type === "tool_use");
  assert.ok(["king", "queen"].includes(call.input.word));
}
await assert.rejects(
  client.messages.create({ ...asked, model: "claude-x", max_tokens: 8 }),
  (error) => error instanceof NotFoundError && error.error.error.type === "not_found_error",
);

const provider = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
const model = provider(name);
const once = await generateText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
assert.ok(["stop", "length"].includes(once.finishReason));
const flow = streamText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
let flown = "";
for await (const piece of flow.textStream) flown += piece;
assert.ok(flown.length > 0);
assert.ok((await flow.usage).outputTokens > 0);
const lookUp = tool({ description: "Looks a word up.", inputSchema: jsonSchema(schema) });
const providerOptions = { anthropic: { disableParallelToolUse: true } };
const required = {
  model,
  prompt,
  tools: { look_up: lookUp },
  toolChoice: "required",
  maxOutputTokens: 300,
  providerOptions,
  maxRetries: 0,
};
for (const calls of [(await generateText(required)).toolCalls, await streamText(required).toolCalls]) {
  assert.equal(calls[0].toolName, "look_up");
  assert.ok(["king", "queen"].includes(calls[0].input.word));
}
