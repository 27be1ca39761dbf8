// The page: load the device, take a photograph or the camera, ask the server with the embedding, and show what was sent.

import * as ort from "./vendor/ort.wasm.min.mjs";
import { cameraFault, startCamera } from "./camera.js";
import { ask, Device, getJson } from "./device/pkd-device.js";
import { bytes, openLedger } from "./ledger.js";
import { $, drawNeedle, drawVector, element, mark, oneIn, paint, say, shortId, showEvidence, showLedger, showTimes } from "./view.js";

const RATES = { search: [0.1, 0.01, 1e-3, 1e-4], pair: [0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6] };
const SERVER = new URL(".", location.href).href.replace(/\/$/, ""); // also behind a proxy's prefix
const state = { device: null, token: takeToken(), embedding: null, photograph: 0, reference: null, camera: null, asking: 0 };
let ledger = [];

openLedger((rows) => showLedger((ledger = rows), state.photograph));

/** Take the token out of the address, so that it is neither in the history nor in a bookmark. */
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) history.replaceState(null, "", location.pathname + location.search);
  return found;
}

/** Read what a token says of itself; the server alone decides what it allows. */
function claims(token) {
  try {
    const text = token.replace(/^pkdt_/, "").split(".")[0].replaceAll("-", "+").replaceAll("_", "/");
    return JSON.parse(atob(text));
  } catch {
    return null;
  }
}

async function start() {
  const lines = new Map();
  const progress = ({ file, received, total }) => {
    if (!lines.has(file)) {
      const line = element("li");
      line.append(element("span", file), element("span"));
      $("loads").append(line);
      lines.set(file, line.lastChild);
    }
    lines.get(file).textContent = total ? `${bytes(received)} of ${bytes(total)}` : bytes(received);
  };
  $("loads").replaceChildren();
  $("ask-token").hidden = true;
  $("start-says").textContent = "Loading the face encoder, the detector and their runtime (WebAssembly, 3.7 MB)…";
  try {
    const gpu = { load: () => import("./vendor/ort.jspi.min.mjs"), software: location.search === "?software-gpu" };
    state.device = await Device.open({ ort, gpu, server: SERVER, token: state.token ?? undefined, progress });
    await loadGalleries();
  } catch (error) {
    $("start-says").textContent = startFault(error);
    $("start-says").className = "hint wrong";
    $("ask-token").hidden = error.type !== "auth";
    if (error.type === "auth") $("token").focus();
    return;
  }
  const { device } = state, { detail } = device;
  const licence = detail.licence === "not stated" ? "licence not stated" : `licence ${detail.licence}`;
  const threads = ort.env.wasm.numThreads;
  $("about").textContent =
    `Encoder ${shortId(device.encoder)}, ${licence}. Self-test passed: 1 − cosine ${device.goldenError.toExponential(1)}. ` +
    (device.runtime === "WebGPU" ? "WebGPU." : `WebAssembly on ${threads} thread${threads > 1 ? "s" : ""}; ${device.note}.`);
  $("start").hidden = true;
  $("work").hidden = false;
  performance.mark("pkd-ready");
  const fault = cameraFault();
  if (fault) $("camera").disabled = true;
  hint(fault ? `Choose a photograph. ${fault}` : "Choose a photograph, drop one here, or use the camera.");
}

function startFault(error) {
  if (error.type === "auth") {
    return state.token
      ? "This token is not valid, or not any more. Open a new link, or enter another token."
      : "This server asks for a token. Open the link that you were given, or enter the token here.";
  }
  if (error.name === "TypeError") return "The server cannot be reached. Load the page again when it can.";
  if (error.type === "not-found") return `This server gives browsers no detector: ${error.message}`;
  return error.message;
}

/** Fill the choice of galleries; a token names the only one that it opens. */
async function loadGalleries() {
  const said = state.token ? claims(state.token) : null, { client } = state.device;
  let names = [];
  try {
    const path = said?.gallery ? `/v1/galleries/${encodeURIComponent(said.gallery)}` : "/v1/galleries";
    const answer = await getJson(client, path);
    names = (answer.galleries ?? [answer]).map(({ name, subjects }) => [name, subjects]);
  } catch (error) {
    if (!["no-galleries", "forbidden"].includes(error.type)) throw error;
  }
  $("gallery").replaceChildren(
    ...names.map(([name, subjects]) => element("option", `${name} (${subjects})`, { value: name })),
  );
  const modes = Object.fromEntries([...document.getElementsByName("mode")].map((one) => [one.value, one]));
  modes.search.disabled = modes.claim.disabled = !names.length;
  modes.reference.disabled = Boolean(said && !said.scopes.includes("embed"));
  if (!names.length) modes.reference.checked = true;
  await changeMode();
}

const mode = () => document.querySelector('input[name="mode"]:checked').value;

async function changeMode() {
  $("of-gallery").hidden = mode() === "reference";
  $("of-subject").hidden = mode() !== "claim";
  $("of-reference").hidden = mode() !== "reference";
  const searches = mode() === "search", rates = searches ? RATES.search : await pairRates();
  const kept = Number($("rate").value), usual = searches ? 0.01 : 1e-3;
  $("rate").replaceChildren(
    ...rates.map((rate) => element("option", `${oneIn(rate)} ${searches ? "searches for strangers" : "pairs of different people"}`, { value: rate })),
  );
  $("of-rate").hidden = !rates.length;
  $("rate").value = rates.includes(kept) ? kept : rates.includes(usual) ? usual : (rates[0] ?? "");
  $("rate-says").textContent = searches
    ? "Share of searches for people who are not enrolled that may find somebody (FPIR)."
    : "Share of pairs of different people that may count as a match (FMR), as far as the certificate resolves it.";
  clearAnswer();
  await question();
}

/** List the false match rates that every certificate of this encoder resolves. */
async function pairRates() {
  const { device } = state;
  device.certificates ??= (await getJson(device.client, `/v1/certificates?query=${encodeURIComponent(device.encoder)}`)).certificates;
  const covers = (rate) => device.certificates.some((one) => one.points.some((point) => point.fmr <= rate) && one.points[0].fmr >= rate);
  return RATES.pair.filter(covers);
}

function hint(said, wrong = false) {
  const text = said.charAt(0).toUpperCase() + said.slice(1); // the module's messages are parts of longer lines elsewhere
  if ($("hint").textContent !== text) $("hint").textContent = text; // said once by a screen reader
  $("hint").classList.toggle("wrong", wrong);
}

/** Embed one picture and show each step. `size`: its bytes as a file. */
async function take(photograph, size, live = false) {
  const made = await state.device.embed(photograph);
  state.embedding = made.embedding;
  state.photograph = size;
  $("stage").hidden = $("made").hidden = $("times").hidden = false;
  if (!live) {
    paint($("picture"), made.image);
    mark($("overlay"), made.image, made.faces, made.face);
  }
  paint($("crop"), made.crop);
  drawVector($("vector"), made.embedding);
  $("vector-says").textContent = `the embedding: ${made.embedding.length} numbers, all that a question sends`;
  showTimes(made.ms);
  showLedger(ledger, size);
  if (!document.documentElement.dataset.embedded) performance.mark("pkd-embedded");
  document.documentElement.dataset.embedded = Number(document.documentElement.dataset.embedded ?? 0) + 1;
  return made;
}

async function takeFile(file) {
  if (!file) return;
  stopCamera();
  hint("Looking for a face…");
  state.embedding = null;
  showLedger(ledger, (state.photograph = 0));
  state.asking += 1; // an answer that is still under way is about the picture before
  clearAnswer();
  try {
    const { faces } = await take(file, file.size);
    hint(faces.length > 1 ? `${faces.length} faces: the marked one is taken.` : "");
  } catch (error) {
    $("made").hidden = $("times").hidden = true;
    $("stage").hidden = !error.image;
    if (error.image) {
      paint($("picture"), error.image);
      mark($("overlay"), error.image, [], null);
    }
    hint(error.message, true);
    return;
  }
  await question();
}

async function toggleCamera() {
  if (state.camera) {
    stopCamera();
    hint("The camera is off.");
    return;
  }
  $("camera").disabled = true;
  try {
    showLive(true);
    state.camera = await startCamera(state.device, (text) => hint(text || "Good."), async (image) => {
      await take(image, image.width * image.height * 3, true);
      await question();
    });
    $("camera").textContent = "Stop the camera";
  } catch (error) {
    showLive(false);
    $("stage").hidden = true;
    hint(error.message, true);
  } finally {
    $("camera").disabled = false;
    $("camera").setAttribute("aria-pressed", String(state.camera !== null));
  }
}

/** Mirror what a camera shows, as a mirror does; the pixels that are embedded are never mirrored. */
function showLive(live) {
  $("video").hidden = !live;
  $("picture").hidden = live;
  $("overlay").classList.toggle("mirrored", live);
  if (live) $("stage").hidden = false;
}

function stopCamera() {
  state.camera?.stop();
  state.camera = null;
  $("camera").textContent = "Use the camera";
  $("camera").setAttribute("aria-pressed", "false");
  $("stage").hidden = true;
  showLive(false);
}

async function takeReference(file) {
  if (!file) return;
  state.reference = null;
  $("reference-says").textContent = "Sending it…";
  try {
    const options = { method: "POST", headers: { "content-type": file.type || "image/jpeg" }, body: file };
    const made = await (await ask(state.device.client, "/v1/embed?encoding=b64_f16", options)).json();
    const [{ embedding, encoding }] = made.data;
    state.reference = { embedding, encoding, encoder: made.encoder.id };
    $("reference-says").textContent = `${file.name} was sent (${bytes(file.size)}) and embedded by ${shortId(made.encoder.id)}.`;
  } catch (error) {
    $("reference-says").textContent = askFault(error);
  }
  await question();
}

function clearAnswer() {
  say("none", "No question asked yet.");
  $("needle").setAttribute("hidden", "");
  $("candidates").hidden = true;
  $("evidence").textContent = "";
  $("evidence").classList.remove("amber");
}

/** Ask what is chosen, if all that it needs is there. Only the answer to the last question is shown. */
async function question() {
  const { device, embedding, reference } = state, rate = Number($("rate").value), turn = ++state.asking;
  if (!embedding) return;
  const gallery = $("gallery").value, subject = $("subject").value.trim();
  try {
    if (mode() === "search" && gallery) {
      const found = await device.identify(embedding, gallery, { target_fpir: rate, top_k: 3 });
      if (turn === state.asking) showFound(found);
      return;
    }
    const other = mode() === "claim" ? (subject && gallery ? { gallery, subject } : null) : reference;
    if (mode() === "search" || !other) return;
    const policy = rate ? { target_fmr: rate } : undefined;
    const answer = await device.verify(embedding, other, policy);
    if (turn === state.asking) showPair(answer, mode() === "claim" ? subject : null);
  } catch (error) {
    if (turn !== state.asking) return;
    clearAnswer();
    say("unsure", askFault(error));
  }
}

function showPair(answer, subject) {
  const yes = subject ? `Yes, this is ${subject}.` : "The same person.";
  const no = subject ? `No, this is not ${subject}.` : "Different people.";
  say(answer.match ? "match" : "no", answer.match ? yes : no);
  drawNeedle({ score: answer.score, threshold: answer.threshold, calibrated: true });
  const { certificate, fmr_at_score: rate, fmr_is_upper_bound: bound, fmr_ci95: interval } = answer;
  showEvidence({ rate, bound, interval, certificate, calibrated: true });
  $("candidates").hidden = true;
}

function showFound(found) {
  const matching = found.candidates.filter((one) => one.match).map((one) => one.subject), [best] = found.candidates;
  if (found.decision === "match") say("match", `This is ${matching[0]}.`);
  else if (found.decision === "ambiguous") say("unsure", `Several people fit: ${matching.join(", ")}. Undecided.`);
  else say("no", found.templates ? `Nobody in ${found.gallery}.` : `${found.gallery} is empty.`);
  $("candidates").replaceChildren(
    ...found.candidates.map((one) => element("li", `${one.subject}: ${one.score.toFixed(3)}${one.match ? ", fits" : ""}`)),
  );
  $("candidates").hidden = !found.candidates.length;
  if (!best) return;
  const searched = found.searched.find((one) => one.encoder === best.encoder);
  drawNeedle({ score: best.score, threshold: best.threshold, calibrated: searched.calibrated });
  const { fmr_at_score: rate, fmr_is_upper_bound: bound } = best;
  showEvidence({ rate, bound, certificate: searched.certificate, calibrated: searched.calibrated });
}

function askFault(error) {
  if (error.name === "TypeError") {
    return "The server cannot be reached. The photograph was embedded here all the same; only the question failed.";
  }
  if (error.type === "auth") return "The token is not valid any more. Open a new link.";
  if (error.type === "rate-limited" || error.type === "overloaded") return "Too many questions at once. Wait a moment.";
  if (error.type === "invalid-request" && mode() === "claim") {
    return "An id begins with a letter or a digit; up to 127 letters, digits and . _ @ + - may follow.";
  }
  if (error.type === "unknown-subject") return `Nobody is enrolled as ${$("subject").value.trim()}.`;
  return error.message;
}

$("ask-token").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim() || null;
  $("token").value = "";
  $("start-says").className = "";
  start();
});
$("file").addEventListener("change", (event) => takeFile(event.target.files[0]).finally(() => (event.target.value = "")));
$("reference").addEventListener("change", (event) => takeReference(event.target.files[0]));
$("camera").addEventListener("click", toggleCamera);
for (const one of document.getElementsByName("mode")) one.addEventListener("change", changeMode);
for (const id of ["gallery", "subject", "rate"]) $(id).addEventListener("change", question);
addEventListener("hashchange", () => {
  const token = takeToken(); // a link with a new token, opened in the tab that is here already
  if (!token) return;
  stopCamera();
  Object.assign(state, { token, embedding: null, reference: null });
  $("work").hidden = true;
  $("start").hidden = false;
  $("start-says").className = "";
  start();
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  if (!$("work").hidden) takeFile(event.dataTransfer.files[0]);
});
start();
