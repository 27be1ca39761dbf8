// Doubtful people of a gallery: one person under two names, two under one; merged or taken apart with receipts.

import { ask, part } from "./api.js";
import { guarded } from "./console.js";
import { $, button, count, element, fillTable, receipt } from "./view.js";

/** Show the review of a gallery; `changed` is called after a move. */
export async function showReview(gallery, changed) {
  const box = $("review");
  box.hidden = false;
  box.replaceChildren("Comparing everybody with everybody…");
  let found;
  try {
    found = await ask("GET", `/v1/galleries/${part(gallery)}/review?limit=100`);
  } catch (error) {
    box.hidden = true;
    throw error;
  }
  const move = (subject, body, words) =>
    guarded(async () => {
      if (!confirm(words)) return;
      const done = await ask("POST", `/v1/galleries/${part(gallery)}/subjects/${part(subject)}/move`, { body });
      receipt($("receipt"), `${count(done.templates.length)} templates are ${done.into}’s now.`, done.receipt);
      await changed();
      await showReview(gallery, changed);
    });
  const pairs = element("table"), outliers = element("table");
  const left = Object.values(found.not_compared).reduce((sum, one) => sum + one, 0);
  box.replaceChildren(
    element("h3", "Perhaps one person under two names"), scroll(pairs),
    element("h3", "Perhaps another person under this name"), scroll(outliers),
    element("p", `${count(found.compared)} pairs of templates compared${left ? `; ${count(left)} templates have no certificate and were left out` : ""}.`, "small"),
  );
  fillTable(
    pairs,
    ["subject", "other", "score", "expected by chance", ""],
    found.pairs.map((one) => [
      one.subject, one.other, one.score.toFixed(4), `${one.expected_false.toPrecision(2)}${one.calibrated ? "" : ", extrapolated"}`,
      button("Merge…", move(one.other, { into: one.subject }, `All templates of ${one.other} become ${one.subject}’s. ${one.other} is gone then.`), "danger"),
    ]),
    "No doubtful pair.",
  );
  fillTable(
    outliers,
    ["subject", "template", "score to their own", "threshold", "looks like", ""],
    found.outliers.map((one) => [
      one.subject, one.template, one.score.toFixed(4), one.threshold.toFixed(4), one.nearest ?? "–",
      one.nearest ? button("Move…", move(one.subject, { into: one.nearest, templates: [one.template] }, `Template ${one.template} of ${one.subject} becomes ${one.nearest}’s.`), "danger") : "",
    ]),
    "No outlier.",
  );
}

function scroll(table) {
  const region = element("div", "", "scroll");
  region.append(table);
  return region;
}
