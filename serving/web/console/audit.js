// The audit trail, newest first, and a walk over its chain of hashes.

import { ask } from "./api.js";
import { guarded } from "./console.js";
import { $, count, element, fillTable, moment } from "./view.js";

let records = [], next = null;

export async function loadAudit() {
  records = [];
  next = null;
  await more();
}

async function more() {
  const page = await ask("GET", `/v1/audit?limit=50${next ? `&before=${next}` : ""}`);
  records.push(...page.records);
  next = page.next;
  $("records-more").disabled = !next;
  fillTable(
    $("record-list"),
    ["number", "time (UTC)", "by", "did", "gallery", "subject (pseudonym)", "templates", "hash"],
    records.map((one) => [one.sequence, moment(one.time), one.actor, one.action, one.gallery, one.subject ? element("span", `${one.subject.slice(0, 12)}…`, "mono") : "–", count(one.templates), element("span", `${one.hash.slice(0, 12)}…`, "mono")]),
    "Nothing has been changed yet.",
  );
}

async function check() {
  const sequence = $("noted-sequence").value, hash = $("noted-hash").value.trim();
  const noted = sequence || hash ? `?noted_sequence=${sequence}&noted_hash=${hash}` : "";
  $("chain").textContent = "Walking the chain…";
  const found = await ask("GET", `/v1/audit/check${noted}`);
  $("chain").className = found.whole ? "verdict match" : "verdict warn";
  $("chain").replaceChildren(found.whole ? `Whole, ${count(found.sequence)} records. Note this head outside: ${found.sequence} ` : `Broken: ${found.fault}`, found.whole ? element("span", found.hash, "mono") : "");
}

$("check").addEventListener("click", guarded(check));
$("records-more").addEventListener("click", guarded(more));
