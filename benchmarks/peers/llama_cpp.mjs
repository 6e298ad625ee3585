// llama.cpp through node-llama-cpp, with the protocol of child.py on stdin and stdout.
//
// node llama_cpp.mjs FOLDER MODEL THREADS SEQUENCES TOKENS
//
// FOLDER has node-llama-cpp in its node_modules, MODEL is a GGUF file; SEQUENCES run at the same
// time at most, of TOKENS tokens each, prompt included.

import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, modelPath, ...numbers] = process.argv.slice(2);
const [threads, numSequences, contextSize] = numbers.map(Number);
const entry = path.resolve(folder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama} = await import(pathToFileURL(entry).href);

const llama = await getLlama({gpu: false, build: "never", maxThreads: threads});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    sequences: numSequences, contextSize, threads: {ideal: threads, min: threads}
});
const sequences = Array.from({length: numSequences}, () => context.getSequence());

async function run(sequence, prompt, newTokens, start) {
    const times = [];
    // greedy, and over the end of text
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        times.push((performance.now() - start) / 1000);
        if (times.length === newTokens)
            break;
    }
    return times;
}

process.stdout.write("null\n");
for await (const line of readline.createInterface({input: process.stdin})) {
    const {prompts, new_tokens: newTokens} = JSON.parse(line);
    const used = sequences.slice(0, prompts.length);
    await Promise.all(used.map((sequence) => sequence.clearHistory()));
    const start = performance.now();
    const times = await Promise.all(
        used.map((sequence, i) => run(sequence, prompts[i], newTokens, start))
    );
    process.stdout.write(JSON.stringify(times) + "\n");
}
process.exit(0);
