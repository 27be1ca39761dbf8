// Galleries and their subjects: create, enrol, search, read and delete, each deletion with its receipt.

import { ask, part, Refused } from "./api.js";
import { guarded } from "./console.js";
import { showReview } from "./review.js";
import { $, button, count, element, fillTable, moment, percent, rate, receipt, short } from "./view.js";

const PAGE = 50;
let open = null, next = null;

export async function loadGalleries() {
  const { galleries } = await ask("GET", "/v1/galleries");
  fillTable(
    $("gallery-list"),
    ["gallery", "subjects", "templates by encoder", "kept for", "made", ""],
    galleries.map((one) => [
      button(one.name, guarded(() => openGallery(one.name))),
      count(one.subjects),
      Object.entries(one.templates).map(([id, number]) => element("div", `${short(id)}: ${count(number)}`)),
      one.retention_seconds ? `${+(one.retention_seconds / 86400).toFixed(1)} days` : "for good",
      moment(one.created).slice(0, 10),
      button("Delete…", guarded(() => removeGallery(one.name)), "danger"),
    ]),
    "No gallery yet.",
  );
  if (open && !galleries.some((one) => one.name === open)) {
    open = null;
    $("gallery").hidden = true;
  }
}

async function removeGallery(name) {
  if (prompt(`Everyone in ${name} is deleted, and its key. Nothing brings them back. Type the gallery's name:`) !== name) return;
  receipt($("receipt"), `The gallery ${name} is deleted.`, await ask("DELETE", `/v1/galleries/${part(name)}`));
  await loadGalleries();
}

async function openGallery(name) {
  const gallery = await ask("GET", `/v1/galleries/${part(name)}`);
  open = name;
  for (const id of ["found", "enrolled"]) $(id).replaceChildren();
  $("subject").hidden = $("review").hidden = $("receipt").hidden = true;
  $("gallery").hidden = false;
  $("gallery-title").textContent = name;
  const { quality = {}, query_quality = {}, liveness = {} } = gallery.policy ?? {};
  const stated = (limits) => Object.entries(limits).filter(([measure, limit]) => limit !== { yaw: 180, pitch: 180, roll: 180, occlusion: 1 }[measure] && limit !== 0).map(([measure, limit]) => `${measure} ${limit}`).join(", ");
  const rules = [
    ["space", short(gallery.space.id)],
    ...(gallery.moving_to ? [["moving to", short(gallery.moving_to.id)]] : []),
    ...(stated(quality) ? [["enrolments need", stated(quality)]] : []),
    ...(stated(query_quality) ? [["queries need", stated(query_quality)]] : []),
    ...(liveness.enrol || liveness.query ? [["proof of a living person", [liveness.enrol && "to enrol", liveness.query && "to search"].filter(Boolean).join(" and ")]] : []),
  ];
  $("gallery-facts").replaceChildren(...rules.map(([what, is]) => element("p", `${what}: ${is}`, "small")));
  $("gallery-title").focus();
  await listSubjects("");
}

async function listSubjects(after) {
  try {
    const page = await ask("GET", `/v1/galleries/${part(open)}/subjects?limit=${PAGE}&after=${part(after)}`);
    next = page.next;
    fillTable(
      $("subject-list"),
      ["subject", ""],
      page.subjects.map((id) => [button(id, guarded(() => showSubject(id))), button("Delete…", guarded(() => removeSubject(id)), "danger")]),
      "Nobody is enrolled.",
    );
  } catch (error) {
    if (!(error instanceof Refused) || error.type !== "forbidden") throw error;
    next = null;
    fillTable($("subject-list"), ["subject"], [], "Your key may not list subjects (scope admin).");
  }
  $("subjects-more").disabled = !next;
}

async function showSubject(id) {
  const one = await ask("GET", `/v1/galleries/${part(open)}/subjects/${part(id)}`);
  const table = element("table"), region = element("div", "", "scroll");
  region.append(table);
  const said = [
    ...Object.entries(one.attributes).map(([name, value]) => `${name}: ${value}`),
    ...(one.consent ? [`ground: ${[one.consent.basis, one.consent.reference, one.consent.given].filter(Boolean).join(", ")}`] : []),
  ];
  $("subject").replaceChildren(element("h3", id), ...said.map((line) => element("p", line, "small")), region);
  $("subject").hidden = false;
  fillTable(table, ["template", "encoder", "enrolled", "deleted on"], one.templates.map((t) => [t.id, short(t.encoder), moment(t.created), moment(t.expires)]), "No template.");
}

async function removeSubject(id) {
  if (!confirm(`Delete ${id} from ${open}, with all templates and the key?`)) return;
  receipt($("receipt"), `${id} is deleted from ${open}.`, await ask("DELETE", `/v1/galleries/${part(open)}/subjects/${part(id)}`));
  $("subject").hidden = true;
  await Promise.all([listSubjects(""), loadGalleries()]);
}

async function search() {
  const form = new FormData();
  form.append("image", $("search-file").files[0]);
  form.append("aligned", $("search-aligned").checked);
  $("found").replaceChildren("Searching…");
  let answer;
  try {
    answer = await ask("POST", `/v1/galleries/${part(open)}/identify`, { body: form });
  } catch (error) {
    $("found").replaceChildren();
    throw error;
  }
  const verdicts = { match: ["This is somebody enrolled.", "match"], no_match: ["Nobody enrolled looks alike enough.", "no"], ambiguous: ["Two or more look alike enough.", "warn"] };
  const [words, kind] = verdicts[answer.decision];
  const table = element("table"), region = element("div", "", "scroll");
  region.append(table);
  const note = answer.target_fpir === null ? "" : `${count(answer.templates)} templates; ${percent(answer.target_fpir)} of strangers may find somebody.`;
  $("found").replaceChildren(
    element("p", words, `verdict ${kind}`), region, element("p", note, "small"),
    ...(answer.calibrated ? [] : [element("p", "The threshold is extrapolated: no certificate resolves so small a rate.", "verdict warn")]),
  );
  fillTable(
    table,
    ["subject", "score", "threshold", "by chance at most"],
    answer.candidates.map((one) => [element("b", `${one.match ? "✓ " : ""}${one.subject}`), one.score.toFixed(4), one.threshold.toFixed(4), `${one.fmr_is_upper_bound ? "≤ " : ""}${rate(one.fmr_at_score)}`]),
    "No candidate.",
  );
}

async function enrol() {
  const subject = $("enrol-subject").value, form = new FormData();
  for (const file of $("enrol-files").files) form.append("image", file);
  form.append("aligned", $("enrol-aligned").checked);
  if ($("enrol-basis").value) form.append("consent", JSON.stringify({ basis: $("enrol-basis").value, given: new Date().toISOString().slice(0, 10) }));
  const path = `/v1/galleries/${part(open)}/subjects/${part(subject)}/templates`;
  const headers = { "idempotency-key": crypto.getRandomValues(new Uint32Array(4)).join("-") };
  $("enrolled").replaceChildren("Enrolling…");
  try {
    const answer = await ask("POST", path, { body: form, headers });
    const measured = answer.templates.map(({ id, quality }) => element("div", `template ${id}: ${Object.entries(quality ?? {}).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${value}`).join(", ")}`, "small"));
    $("enrolled").replaceChildren(element("p", `${subject} is enrolled, change ${answer.sequence}.`, "verdict match"), ...measured);
    $("enrol").reset();
  } catch (error) {
    $("enrolled").replaceChildren();
    throw error;
  }
  await Promise.all([listSubjects(""), loadGalleries()]);
}

async function create() {
  const days = $("create-days").value;
  await ask("PUT", `/v1/galleries/${part($("create-name").value)}`, { body: days ? { retention_seconds: days * 86400 } : {} });
  const name = $("create-name").value;
  $("create").reset();
  await loadGalleries();
  await openGallery(name);
}

for (const [id, act] of [["search", search], ["enrol", enrol], ["create", create]]) {
  const run = guarded(act);
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
}
$("doubts").addEventListener("click", guarded(() => showReview(open, () => Promise.all([listSubjects(""), loadGalleries()]))));
$("subjects-first").addEventListener("click", guarded(() => listSubjects("")));
$("subjects-more").addEventListener("click", guarded(() => listSubjects(next)));
