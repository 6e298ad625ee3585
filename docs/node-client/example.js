// Streams a completion over gRPC, then shows how an error looks: node example.js [HOST:PORT [KEY]]
const { ChannelCredentials } = require("@grpc/grpc-js");
const { GrpcTransport } = require("@protobuf-ts/grpc-transport");
const { InferenceClient } = require("./generated/protos/inference.client");
const { GenerateRequest } = require("./generated/protos/inference");

const [host = "127.0.0.1:50051", key] = process.argv.slice(2);
const transport = new GrpcTransport({
  host,
  channelCredentials: ChannelCredentials.createInsecure(),
  meta: key ? { authorization: `Bearer ${key}` } : {},
  timeout: 120_000, // becomes the call's deadline
});
const client = new InferenceClient(transport);

async function main() {
  const request = GenerateRequest.create({
    input: { oneofKind: "text", text: "ROMEO:" },
    samplingParams: { maxTokens: 24n, temperature: 0 },
  });
  const call = client.generateStream(request);
  for await (const chunk of call.responses) {
    process.stdout.write(chunk.text);
    if (chunk.finishInfo) console.log(`\nended after ${chunk.finishInfo.usage.completionTokens} tokens`);
  }
  try {
    await client.generate(GenerateRequest.create({ model: "other", input: request.input }));
  } catch (error) {
    console.log(`${error.code}: ${decodeURIComponent(error.message)}`);
  }
  transport.close();
}

main();
