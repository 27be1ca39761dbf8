// Encoders, and who may be matched with whom: the matrix of ordered pairs with their certificates, rates and ages.

import { ask } from "./api.js";
import { showDrift } from "./drift.js";
import { $, age, count, element, fillTable, markOverflow, percent, rate, short } from "./view.js";

const OLD_DAYS = 365;
let encoders = [], certificates = [];

export async function loadEncoders() {
  [{ encoders }, { certificates }] = await Promise.all([ask("GET", "/v1/encoders"), ask("GET", "/v1/certificates")]);
  const rates = [...new Set(certificates.flatMap((one) => one.points.map((point) => point.fmr)))].sort((a, b) => b - a);
  const chosen = rates.includes(1e-3) ? 1e-3 : rates.at(-1);
  $("fmr").replaceChildren(...rates.map((fmr) => Object.assign(element("option", rate(fmr)), { value: fmr, selected: fmr === chosen })));
  $("fmr").onchange = drawMatrix;
  drawMatrix();
  fillTable(
    $("encoder-list"),
    ["encoder", "role", "space", "numbers", "precision", "licence"],
    encoders.map((one) => [
      [short(one.id), ...(one.default ? [element("small", "default for photographs")] : [])],
      one.role, short(one.space.id), one.space.dim, one.numeric_mode, one.licence,
    ]),
    "No encoder is loaded.",
  );
  await showDrift(certificates);
}

function drawMatrix() {
  const fmr = Number($("fmr").value);
  const ids = [...new Set([...encoders.map((one) => one.id), ...certificates.flatMap((one) => [one.query, one.gallery])])];
  const head = element("tr");
  head.append(element("th", "asks ↓ enrolled →"), ...ids.map((id) => Object.assign(element("th", short(id)), { scope: "col" })));
  const body = ids.map((query) => {
    const line = element("tr");
    line.append(Object.assign(element("th", short(query)), { scope: "row" }), ...ids.map((gallery) => cellOf(query, gallery, fmr)));
    return line;
  });
  const thead = element("thead"), tbody = element("tbody");
  thead.append(head);
  tbody.append(...body);
  $("matrix").replaceChildren(thead, tbody);
  markOverflow($("matrix"));
}

function cellOf(query, gallery, fmr) {
  const found = certificates.find((one) => one.query === query && one.gallery === gallery);
  if (!found) return element("td", "not compared: no certificate", "none");
  const point = found.points.find((one) => one.fmr === fmr);
  const made = element("td");
  if (point) {
    made.className = point.tar_balanced >= 0.9 ? "good" : "poor";
    const [low, high] = point.tar_balanced_ci95;
    made.append(
      element("b", percent(point.tar_balanced)),
      element("small", `recognised (TAR), ${(100 * low).toFixed(1)}–${percent(high)}`),
      element("small", `threshold ${point.threshold.toFixed(4)}`),
    );
  } else {
    made.className = "poor";
    made.append(element("b", "–"), element("small", `this rate is not resolved; smallest ${rate(found.min_fmr ?? found.points.at(-1).fmr)}`));
  }
  const old = Date.now() - new Date(found.created) > OLD_DAYS * 86400000;
  made.append(
    element("small", `${count(found.identities)} people, ${count(found.impostor_pairs)} impostor pairs`),
    element("small", `${found.data_name}, ${age(found.created)}`, old ? "alarm" : ""),
  );
  if (found.synthetic) made.append(element("small", "measured on drawings, says nothing about people", "alarm"));
  return made;
}
