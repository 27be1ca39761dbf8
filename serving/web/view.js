// What the page draws and says: picture, points, crop, vector, needle, verdict and evidence.

import { bytes } from "./ledger.js";

export const $ = (id) => document.getElementById(id);

/** Make an element with text and attributes. Text is never read as HTML: names of subjects come from others. */
export function element(tag, text = "", attributes = {}) {
  const space = "http://www.w3.org/2000/svg", drawn = ["line", "rect", "path", "text", "title", "g"].includes(tag);
  const made = drawn ? document.createElementNS(space, tag) : document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Draw an image {width, height, data} of RGB bytes. */
export function paint(canvas, { width, height, data }) {
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) rgba.set(data.subarray(from, from + 3), to);
  Object.assign(canvas, { width, height }).getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
}

/** Mark faces on a canvas of its own, so that the next frame does not erase them; the chosen one in full colour. */
export function mark(canvas, { width, height }, faces, chosen) {
  const context = Object.assign(canvas, { width, height }).getContext("2d"), thick = Math.max(2, width / 250);
  for (const face of faces) {
    const [x1, y1, x2, y2] = face.box;
    context.lineWidth = thick;
    context.strokeStyle = face === chosen ? "#57e39b" : "#c3ccd4";
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    if (face !== chosen) continue;
    context.fillStyle = "#ffd257";
    for (const [x, y] of face.landmarks) {
      context.beginPath();
      context.arc(x, y, thick * 1.3, 0, 2 * Math.PI);
      context.fill();
    }
  }
}

/** Draw an embedding as bars, one for each number. */
export function drawVector(canvas, vector) {
  const context = canvas.getContext("2d"), { width, height } = canvas, step = width / vector.length;
  const largest = vector.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  context.clearRect(0, 0, width, height);
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  vector.forEach((value, n) => {
    const bar = (value / largest) * (height / 2);
    context.fillRect(n * step, height / 2 - Math.max(0, bar), Math.max(step * 0.8, 0.8), Math.max(1, Math.abs(bar)));
  });
}

/** Show the milliseconds of each step. */
export function showTimes(ms) {
  const total = Object.values(ms).reduce((sum, one) => sum + one, 0);
  const pairs = [...Object.entries(ms), ["together", total]];
  $("times").replaceChildren(
    ...pairs.map(([step, time]) => {
      const pair = element("div");
      pair.append(element("dt", step), element("dd", `${time.toFixed(time < 10 ? 1 : 0)} ms`));
      return pair;
    }),
  );
}

/** Say the verdict in words. `kind`: match, no, unsure or none. */
export function say(kind, text) {
  $("answer").replaceChildren(element("p", text, { class: `verdict ${kind}` }));
}

const LOW = -0.2, place = (score) => 20 + ((Math.min(1, Math.max(LOW, score)) - LOW) / (1 - LOW)) * 560;

/** Draw the needle: a score between −0.2 and 1, the threshold as a tick, and the zone in which faces match. */
export function drawNeedle({ score, threshold, calibrated }) {
  const parts = [], reached = threshold !== null && threshold <= 1, pointed = `translate(${place(score)} 0)`;
  const words = `similarity ${score.toFixed(3)}, ${threshold === null ? "no threshold" : `threshold ${threshold.toFixed(3)}`}`;
  parts.push(element("title", words, { id: "needle-title" }));
  if (reached) {
    const from = place(threshold);
    const zone = calibrated ? "zone" : "zone extrapolated";
    parts.push(element("rect", "", { class: zone, x: from, y: 24, width: 580 - from, height: 28 }));
    parts.push(element("line", "", { class: "tick", x1: from, x2: from, y1: 18, y2: 58 }));
    parts.push(element("text", `match from ${threshold.toFixed(3)}`, { x: Math.min(from, 470), y: 14 }));
  }
  parts.push(element("line", "", { class: "scale", x1: 20, x2: 580, y1: 52, y2: 52 }));
  for (const at of [-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1]) {
    parts.push(element("line", "", { class: "scale", x1: place(at), x2: place(at), y1: 52, y2: 57 }));
    parts.push(element("text", at.toFixed(1), { x: place(at), y: 78, "text-anchor": "middle" }));
  }
  parts.push(element("path", "", { class: "pointer", d: "M -8 26 L 8 26 L 0 51 Z", transform: pointed }));
  $("needle").replaceChildren(...parts);
  $("needle").removeAttribute("hidden"); // an SVG element has no property of that name
}

/** Write a rate for people: 0.001 → "1 in 1,000". */
export function oneIn(rate) {
  if (rate === 0) return "none";
  if (rate > 0.5) return `${Math.round(rate * 100)} in 100`;
  return `1 in ${Number((1 / rate).toPrecision(3)).toLocaleString("en")}`;
}

/** Write the short form of an encoder's id, as the server does. */
export const shortId = (id) => id.replace(/@sha256:([0-9a-f]{10})[0-9a-f]*/, "@$1");

/** Say on what evidence an answer rests; amber where a threshold was not measured. */
export function showEvidence({ rate, bound, interval, certificate, calibrated }) {
  const people = certificate.identities.toLocaleString("en"), pairs = certificate.impostor_pairs.toLocaleString("en");
  const signer = certificate.signature
    ? `signed by ${certificate.signature.key.slice(0, 17)}…${certificate.signature.verified ? "" : " (not checked)"}`
    : "not signed";
  const text = [
    `Of pairs of different people, ${bound ? "at most " : ""}${oneIn(rate)} scored this high`,
    interval ? ` (95 % interval ${oneIn(interval[0])} to ${oneIn(interval[1])})` : "",
    `, measured on ${people} people, ${pairs} pairs (${certificate.data_name}). `,
    `Certificate ${shortId(certificate.query)} → ${shortId(certificate.gallery)}, ${signer}.`,
    certificate.synthetic ? " Measured on drawn faces: the rates say nothing about people." : "",
    calibrated ? "" : " The threshold for so rare an error is extrapolated: its rate was not measured.",
  ];
  $("evidence").textContent = text.join("");
  $("evidence").classList.toggle("amber", !calibrated || certificate.synthetic);
}

/** Show the ledger and its total beside the size of the photograph. */
export function showLedger(rows, photograph) {
  $("ledger").replaceChildren(
    ...rows.slice(-60).reverse().map((row) => {
      const made = element("tr", "", row.pixels ? { class: "pixels" } : {});
      const path = decodeURIComponent(row.path).replace(/@sha256:([0-9a-f]{10})[0-9a-f]*/, "@$1");
      const what = `${row.method} ${path}${row.pixels ? " (carries a picture)" : ""}`;
      const state = row.status === "failed" ? "failed" : row.received === null ? "…" : bytes(row.received);
      made.append(element("td", what, { title: what }), element("td", bytes(row.sent)));
      made.append(element("td", state), element("td", row.ms === null ? "…" : row.ms.toFixed(0)));
      return made;
    }),
  );
  const sent = rows.reduce((sum, row) => sum + row.sent, 0), asked = rows.filter((row) => row.sent).length;
  const pictures = rows.filter((row) => row.pixels).length;
  const beside = photograph ? ` The photograph has ${bytes(photograph)} and stayed here.` : "";
  const carried = pictures ? ` ${pictures} carried a reference picture.` : " None carried a picture.";
  $("total").textContent = asked ? `${bytes(sent)} in ${asked} question${asked > 1 ? "s" : ""}.${carried}${beside}` : `Nothing yet.${beside}`;
}
