// Queue and latency now: the server's own counters, read every two seconds while the section is open.

import { ask } from "./api.js";
import { $, count, element, fillTable } from "./view.js";

const EVERY = 2000;
let timer = null, first = null;

/** Read Prometheus' text format → [{ name, labels, value }]. */
export function readMetrics(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!parts) continue;
    const labels = Object.fromEntries([...(parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    found.push({ name: parts[1], labels, value: Number(parts[3]) });
  }
  return found;
}

const sum = (metrics, name, chosen = () => true) => metrics.filter((one) => one.name === name && chosen(one.labels)).reduce((total, one) => total + one.value, 0);

/** The time below which `share` of what a histogram counted between two readings lies, seconds; null for nothing. */
export function quantile(before, after, name, share, chosen = () => true) {
  const buckets = new Map();
  for (const [sign, metrics] of [[-1, before], [1, after]])
    for (const one of metrics)
      if (one.name === `${name}_bucket` && chosen(one.labels)) {
        const edge = one.labels.le === "+Inf" ? Infinity : Number(one.labels.le);
        buckets.set(edge, (buckets.get(edge) ?? 0) + sign * one.value);
      }
  const edges = [...buckets.keys()].sort((a, b) => a - b), total = buckets.get(Infinity) ?? 0;
  if (!total) return null;
  let low = 0, below = 0;
  for (const edge of edges) {
    const reached = buckets.get(edge);
    if (reached >= share * total) return edge === Infinity ? low : low + (edge - low) * ((share * total - below) / Math.max(reached - below, 1e-12));
    [low, below] = [edge, reached];
  }
  return low;
}

const ms = (seconds) => (seconds === null ? "–" : `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`);

async function look() {
  const metrics = readMetrics(await ask("GET", "/metrics", { text: true }));
  first ??= metrics;
  const up = metrics.find((one) => one.name === "pkd_store_up");
  const gauges = [
    ["workers that answer", count(sum(metrics, "pkd_ready_workers")), !sum(metrics, "pkd_ready_workers")],
    ["galleries can be written", up ? (up.value ? "yes" : "no") : "–", up && !up.value],
    ["requests in progress", count(sum(metrics, "pkd_requests_in_progress"))],
    ["images waiting", count(sum(metrics, "pkd_queue_depth")), sum(metrics, "pkd_queue_depth") > 16],
    ["95 % answered within", ms(quantile(first, metrics, "pkd_request_seconds", 0.95))],
    ["95 % waited at most", ms(quantile(first, metrics, "pkd_queue_seconds", 0.95))],
    ["refused since opened", count(sum(metrics, "pkd_refusals_total") - sum(first, "pkd_refusals_total"))],
  ];
  $("gauges").replaceChildren(...gauges.map(([what, value, bad]) => {
    const box = element("div", "", bad ? "bad" : "");
    box.append(element("b", value), what);
    return box;
  }));
  $("now-says").textContent = `Read at ${new Date().toLocaleTimeString()}; over all workers of the machine that answered.`;
  const routes = [...new Set(metrics.filter((one) => one.name === "pkd_requests_total").map((one) => one.labels.route))];
  const rows = routes.map((route) => {
    const here = (labels) => labels.route === route;
    const answered = sum(metrics, "pkd_requests_total", here) - sum(first, "pkd_requests_total", here);
    return [route, count(answered), ...[0.5, 0.95].map((share) => ms(quantile(first, metrics, "pkd_request_seconds", share, here)))];
  });
  fillTable($("routes"), ["route", "answered", "median", "95 %"], rows.filter((row) => row[1] !== "0"), "Nothing was asked for yet.");
}

export async function startNow() {
  stopNow();
  await look();
  timer = setInterval(() => document.hidden || look().catch((error) => ($("now-says").textContent = error.message)), EVERY);
}

export function stopNow() {
  clearInterval(timer);
  timer = null;
}
