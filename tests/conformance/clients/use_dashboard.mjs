// Drives the web page in a headless Chromium. Prints JSON lines, reads lines from stdin.
//
//   node use_dashboard.mjs tour PAGE_URL ADMIN_URL [SCREENSHOT_FOLDER]
//   node use_dashboard.mjs endure PAGE_URL NUM_UPDATES

import readline from "node:readline";

import chromium from "@sparticuz/chromium";
import { chromium as driver } from "playwright-core";

const LIMIT_MS = 120_000;
// One process cannot close a page and open another; and the page must live with web security.
const LEFT_OUT = ["--single-process", "--no-zygote", "--disable-web-security"];

const [mode, url, ...rest] = process.argv.slice(2);
const errors = [];
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();

function say(found) {
  console.log(JSON.stringify(found));
}

async function open(browser, address, options = {}) {
  const context = await browser.newContext({ locale: "en-GB", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(LIMIT_MS);
  page.on("console", (message) => {
    if (message.type() === "error") errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(String(error.stack)));
  if (options.script) await page.addInitScript(options.script);
  await page.goto(address);
  return page;
}

async function tour(browser, adminUrl, folder) {
  const page = await open(browser, url);
  await page.waitForFunction(() => document.querySelector("#state").textContent === "SERVING");
  await page.waitForFunction(() => {
    const label = document.querySelector("#chart-tokens").getAttribute("aria-label") ?? "";
    return /output [1-9]/.test(label);
  });
  await page.fill("#prompt", "To be, or not");
  await page.fill("#max-tokens", "5");
  await page.click("#try-form button");
  await page.waitForSelector("#visited tbody tr");
  const tried = await page.evaluate(() => ({
    problem: document.querySelector("#try-problem").textContent,
    tokens: document.querySelectorAll("#tokens button").length,
    prompt: document.querySelectorAll("#tokens button.prompt").length,
    layers: document.querySelectorAll("#visited tbody tr").length,
    visited: document.querySelector("#visited tbody td").textContent,
    chosen: document.querySelector("#tokens button[aria-pressed=true]").title,
    hottest: document.querySelectorAll("#hottest tbody tr").length,
  }));
  await page.focus("#heatmap");
  await page.keyboard.press("ArrowRight");
  say({ step: "tried", ...tried, cell: await page.textContent("#cell") });

  await page.fill("#prompt", "a\u0000\u001b\t \u00a0b");
  await page.click("#generate");
  await page.waitForFunction(() => /␛/.test(document.querySelector("#tokens").textContent));
  await page.waitForFunction(() => document.querySelector("#stop").hidden);
  await page.fill("#max-tokens", "128");
  await page.evaluate(() => new Promise((stopped) => { // at the first text: the rest may take a moment only
    const tokens = document.querySelector("#tokens");
    const observer = new MutationObserver(() => {
      if (!tokens.textContent) return;
      observer.disconnect();
      document.querySelector("#stop").click();
      stopped();
    });
    observer.observe(tokens, { childList: true });
    document.querySelector("#generate").click();
  }));
  await page.waitForFunction(() => document.querySelector("#stop").hidden);
  say({ step: "stopped", problem: await page.textContent("#try-problem") });
  say({ step: "crowded", ...(await crowded(browser)) });

  const { value: killed } = await lines.next();
  const began = Date.now();
  await page.waitForSelector(`[data-worker="${killed}"].bad`);
  say({ step: "killed", shown_ms: Date.now() - began, text: await page.textContent(`[data-worker="${killed}"]`) });

  const admin = await open(browser, adminUrl);
  await admin.click("#rebalance-dry");
  await admin.waitForFunction(() => /SUCCEEDED|FAILED|rebalanc/.test(document.querySelector("#operation-result").textContent));
  const result = await admin.textContent("#operation-result");
  for (const one of [page, admin]) await one.context().close(); // they cannot reach a gateway that starts again
  say({ step: "ordered", result });

  await lines.next(); // the gateway starts again
  const phone = await open(browser, url, { viewport: { width: 390, height: 844 } });
  await phone.waitForSelector("[data-samples]");
  const shown = await phone.evaluate(() => ({
    width: document.documentElement.scrollWidth,
    samples: document.querySelector("#chart-tokens").dataset.samples,
  }));
  say({ step: "phone", ...shown });
  for (const [name, options] of folder ? views() : []) {
    const view = await open(browser, url, options);
    await view.waitForTimeout(5_000);
    await view.screenshot({ path: `${folder}/dashboard-${name}.png`, fullPage: name !== "phone" });
  }
}

// A page of 64 workers, 128 experts and long names, on the narrowest phone.
async function crowded(browser) {
  const read = async (name) => (await fetch(`${url}/dashboard/api/${name}`)).json();
  const [state, load, history] = await Promise.all([read("state"), read("load"), read("history")]);
  const numbered = (many, make) => Array.from({ length: many }, (_, i) => make(i));
  const { status } = state;
  status.workers = numbered(64, (i) => ({ ...status.workers[0], name: `attention-${i}.12`, node: "n".repeat(99) }));
  status.problems = [`/${"path/".repeat(60)} is full`];
  status.model.name = "model".repeat(30);
  load.cells = numbered(32, (row) => numbered(4, (i) => [4 * row + i, 1000 * i]));
  load.workers = numbered(32, (row) => `expert-${row}.127`);
  load.counts = numbered(128, (i) => 10_000_000 * i);
  load.copies = numbered(128, () => 1);
  const [none] = history.samples;
  const idle = { ...none, output: 2e7, waiting: { "attention-0": 3 }, ttft: [], itl: [] };
  const busy = { ...idle, ttft: [[0.1, 0.1, 1]], itl: [[0.02, 0.02, 9]] };
  history.samples = [busy, idle, idle].map((sample, i) => ({ ...sample, time: none.time + 2 * i }));
  const page = await open(browser, "about:blank", { viewport: { width: 320, height: 700 } });
  await page.route("**/dashboard/api/*", (route) => {
    state.counters.generation_tokens_total += 1;
    const answers = { state, load, history };
    return route.fulfill({ json: answers[new URL(route.request().url()).pathname.split("/").at(-1)] });
  });
  await page.goto(url);
  await page.waitForSelector("[data-samples]");
  const first = page.locator("#facts .term").first();
  await first.focus();
  const tokens = await page.textContent("#facts");
  await page.waitForFunction((before) => document.querySelector("#facts").textContent !== before, tokens);
  const keepsFocus = await first.evaluate((word) => word === document.activeElement);
  const cut = [];
  for (const word of await page.locator(".term:visible").all()) {
    await word.focus();
    const whole = await word.evaluate((one) => {
      const tip = one.lastChild;
      tip.style.pointerEvents = "auto"; // so that the point finds it
      const { left, right, top, bottom } = tip.getBoundingClientRect();
      const shows = (x, y) => document.elementFromPoint(x, y) === tip;
      return shows(left + 5, top + 5) && shows(right - 5, bottom - 5);
    });
    if (!whole) cut.push(await word.evaluate((one) => one.firstChild.textContent));
  }
  await page.focus("#heatmap");
  for (let step = 0; step < 60; step++) await page.keyboard.press("ArrowRight");
  const found = await page.evaluate(() => {
    const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
    const latest = (name) => document.querySelector(`#chart-${name} + .latest`).textContent;
    return {
      width: document.documentElement.scrollWidth,
      twice: ids.filter((id, i) => ids.indexOf(id) !== i),
      ttft: latest("ttft"),
      queue: latest("queue"),
      scrolled: document.querySelector("#heatmap").parentElement.scrollLeft,
    };
  });
  await page.context().close();
  return { ...found, cut, keepsFocus };
}

function views() {
  const desk = { viewport: { width: 1280, height: 900 } };
  return [
    ["light", { ...desk, colorScheme: "light" }],
    ["dark", { ...desk, colorScheme: "dark" }],
    ["phone", { viewport: { width: 390, height: 844 }, colorScheme: "light" }],
  ];
}

// As many updates as asked, without pauses and without a server: memory must not grow.
async function endure(browser, numUpdates) {
  const page = await open(browser, url);
  await page.waitForFunction(() => document.querySelector("#state").textContent === "SERVING");
  const documents = await page.evaluate(async () => ({
    state: await (await fetch("dashboard/api/state")).json(),
    load: await (await fetch("dashboard/api/load")).json(),
    history: await (await fetch("dashboard/api/history")).json(),
  }));
  await page.context().close();
  const script = `
    const documents = ${JSON.stringify(documents)};
    window.updates = 0;
    window.fetch = async (path) => {
      const name = String(path).match(/api\\/(\\w+)/)[1];
      const found = documents[name];
      if (name === "history") {
        const counts = { seconds: 2, prompt: 1, moved: 0, again: 0, ttft: [], itl: [[0.1, 0.2, 3]] };
        const last = found.samples.at(-1) ?? { time: found.time, ...counts, waiting: {}, kv: {} };
        found.samples = [{ ...last, time: last.time + 2, output: window.updates % 50 }];
      }
      if (name === "state") {
        window.updates += 1;
        found.time += 1;
        found.counters.generation_tokens_total += window.updates % 50;
        if (window.updates % 100 === 0) {
          const event = { time: found.time, generation: 1, cause: "lost expert-1", effect: "go on" };
          found.status.history = [...found.status.history, event].slice(-100);
        }
      }
      return { ok: true, json: async () => structuredClone(found) };
    };
    const later = window.setTimeout.bind(window);
    const { port1, port2 } = new MessageChannel();  // without the 4 ms of timers in timers
    const due = [];
    port1.onmessage = () => due.shift()();
    const atOnce = (call) => { due.push(call); port2.postMessage(null); };
    window.setTimeout = (call, pause) => (pause >= 1000 ? atOnce(call) : later(call, pause));
  `;
  // Nobody looks: painting in software would take most of the time.
  const busy = await open(browser, url, { script, viewport: { width: 320, height: 200 } });
  const session = await busy.context().newCDPSession(busy);
  const heap = async (count) => {
    await busy.waitForFunction((least) => window.updates >= least, count, { timeout: 1_000_000, polling: 200 });
    await session.send("HeapProfiler.collectGarbage");
    const { usedSize } = await session.send("Runtime.getHeapUsage");
    const nodes = await busy.evaluate(() => document.querySelectorAll("*").length);
    return { updates: await busy.evaluate(() => window.updates), bytes: usedSize, nodes };
  };
  // By then the table of events is full.
  const before = await heap(Math.min(12_000, Math.floor(numUpdates / 2)));
  say({ step: "endured", before, after: await heap(numUpdates) });
}

const args = chromium.args.filter((arg) => !LEFT_OUT.includes(arg));
const browser = await driver.launch({ executablePath: await chromium.executablePath(), args, headless: true });
try {
  await (mode === "tour" ? tour(browser, ...rest) : endure(browser, Number(rest[0])));
  say({ step: "end", errors });
} finally {
  await browser.close();
}
process.exit(0);
