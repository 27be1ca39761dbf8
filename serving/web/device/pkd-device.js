// A browser as a pkd device: photograph → face → crop → embedding → question, of which the embedding alone is sent.
//
//     import * as ort from "onnxruntime-web/wasm";
//     import { Device } from "./pkd-device.js";
//
//     const device = await Device.open({ ort, token });        // student, detector and self-test from the server
//     const { embedding } = await device.embed(file);           // a Blob; nothing leaves the browser
//     const answer = await device.identify(embedding, "staff"); // the embedding does
//
// docs/device.md specifies the steps; README.md beside this file has the rest.

import { crop } from "./align.js";
import { decode } from "./decode.js";
import { choose, YuNet } from "./detect.js";
import { request, side } from "./encode.js";
import { readNpz } from "./npz.js";

export { crop, cropBy, similarity } from "./align.js";
export { decode, DecodeError, grab, inspect, turn } from "./decode.js";
export { choose, YuNet } from "./detect.js";
export { encode, request, side } from "./encode.js";

/** Hold a refusal of the server: `type` for programs, `message` for people, `problem` with all of its members. */
export class Refused extends Error {
  name = "Refused";

  constructor(problem, status) {
    super(problem.detail ?? `the server answered ${status}.`);
    Object.assign(this, { problem, status, type: problem.type ?? "internal" });
  }
}

/** Say that a photograph shows nobody. */
export class NoFace extends Error {
  name = "NoFace";
}

/** Say that the student computes something else here than it was certified to. */
export class SelfTestFailed extends Error {
  name = "SelfTestFailed";
}

/** Turn photographs into embeddings of one encoder, and ask a server about them. */
export class Device {
  /**
   * Download what a device needs, and test it. Files come from the browser's cache where the server says that they are
   * the same (ETag).
   *
   * ort: onnxruntime-web · server: its address, by default that of the page · encoder: id or name, by default the
   * first student · token: a short-lived one (docs/security.md) · threads: of WebAssembly ·
   * gpu: see `load` · progress({file, received, total}): called as bytes arrive. Throws Refused, SelfTestFailed, TypeError (no network).
   */
  static async open({ ort, gpu, server = "", encoder, token, threads, minScore, progress = () => {} }) {
    const client = { server: server.replace(/\/$/, ""), token };
    const spec = encoder ?? (await firstStudent(client));
    const detail = await getJson(client, `/v1/encoders/${encodeURIComponent(spec)}`);
    const artifact = `/v1/encoders/${encodeURIComponent(detail.id)}/artifact`;
    const get = async (path, file) => (await download(client, path, file, progress)).arrayBuffer();
    const [student, golden, manifest, detector] = await Promise.all([
      get(artifact, "student"),
      get(`${artifact}?file=golden.npz`, "self-test"),
      getJson(client, `${artifact}?file=manifest.json`),
      get("/v1/detector", "detector"),
    ]);
    await requireDigest(student, detail.artifact.sha256);
    const device = await Device.load({ ort, gpu, manifest, student, golden, detector, threads, minScore });
    return Object.assign(device, { client, detail });
  }

  /**
   * Open files that an application brings along: manifest.json parsed, the others as ArrayBuffer.
   *
   * gpu: {load, software}: `load` imports a build of onnxruntime-web with WebGPU, and is called only where there is an
   * adapter for it. The student moves there if it passes the self-test there; else it stays, and `note` says why.
   * software: take an adapter that is drawn by the processor, too.
   */
  static async load({ ort, gpu, manifest, student, golden, detector, threads, minScore = 0.5 }) {
    ort.env.wasm.numThreads = threads ?? (globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1);
    const open = (file) => ort.InferenceSession.create(new Uint8Array(file), { executionProviders: ["wasm"] });
    const device = new Device();
    device.ort = ort;
    device.encoder = manifest.encoder.id;
    device.size = manifest.encoder.preprocess.size;
    device.client = null;
    device.detail = null;
    device.student = await open(student);
    device.detector = new YuNet(ort, await open(detector), minScore);
    const crops = await readNpz(golden);
    device.goldenError = await device.selfTest(crops, manifest.golden_tolerance);
    device.runtime = "WebAssembly";
    device.note = gpu ? await device.moveToGpu(gpu, student, crops, manifest.golden_tolerance) : "";
    return device;
  }

  /** Compute the student by WebGPU from now on, if there is one and it passes the self-test → why not, or "". */
  async moveToGpu({ load, software = false }, student, crops, allowed) {
    const { ort: before, student: session } = this;
    try {
      const adapter = await globalThis.navigator?.gpu?.requestAdapter();
      if (!adapter || !WebAssembly.Suspending) return "no WebGPU here";
      if (adapter.info?.isFallbackAdapter && !software) return "WebGPU is drawn by the processor here";
      this.ort = await load();
      this.ort.env.wasm.numThreads = 1;
      this.student = await this.ort.InferenceSession.create(new Uint8Array(student), { executionProviders: ["webgpu"] });
      this.goldenError = await this.selfTest(crops, allowed);
      this.runtime = "WebGPU";
      await session.release();
      return "";
    } catch (error) {
      Object.assign(this, { ort: before, student: session });
      return `WebGPU was tried and is not used: ${error.message.split(" Nothing is sent")[0]}`;
    }
  }

  /**
   * Run the golden crops → largest ½·|made − golden|², which is 1 − cosine for vectors of length 1, and sees another
   * length, too. Throws SelfTestFailed over `allowed`.
   */
  async selfTest({ crops, embeddings }, allowed) {
    const [count, dim] = embeddings.shape, length = this.size * this.size * 3;
    let worst = 0;
    for (let n = 0; n < count; n++) {
      const made = await this.run(crops.data.subarray(n * length, (n + 1) * length));
      let square = 0;
      for (let i = 0; i < dim; i++) square += (made[i] - embeddings.data[n * dim + i]) ** 2;
      worst = Math.max(worst, Number.isNaN(square) ? Infinity : square / 2);
    }
    if (worst <= allowed) return worst;
    throw new SelfTestFailed(
      `the student computes something else here: ${worst.toExponential(1)} from its golden embeddings, ` +
        `${allowed} is allowed. Nothing is sent. Use another browser, and report this one.`,
    );
  }

  /** Embed an aligned crop of size × size × 3 bytes → unit vector, Float32Array. */
  async run(pixels) {
    const crops = new this.ort.Tensor("uint8", pixels, [1, this.size, this.size, 3]);
    const output = await this.student.run({ [this.student.inputNames[0]]: crops });
    return Float32Array.from(output[this.student.outputNames[0]].data);
  }

  /**
   * Embed the face of a photograph: a Blob, or an image {width, height, data} of RGB bytes.
   * → {image, faces, face, crop, embedding, ms: {decode, detect, align, embed}}. Throws DecodeError or NoFace.
   */
  async embed(photograph) {
    const clock = [performance.now()];
    const tick = (value) => (clock.push(performance.now()), value);
    const image = tick(photograph instanceof Blob ? await decode(photograph) : photograph);
    const faces = tick(await this.detector.detect(image)), face = choose(faces, image);
    if (!face) throw Object.assign(new NoFace("no face was found. Choose an upright, larger, sharper photograph."), { image });
    const cut = tick(crop(image, face.landmarks, this.size));
    const embedding = tick(await this.run(cut.data));
    const [start, decoded, found, aligned, done] = clock;
    const ms = { decode: decoded - start, detect: found - decoded, align: aligned - found, embed: done - aligned };
    return { image, faces, face, crop: cut, embedding, ms };
  }

  /** Make the body of POST /v1/verify for an enrolled subject. */
  request(embedding, gallery, subject) {
    return request(embedding, this.encoder, gallery, subject);
  }

  /** Ask whether an embedding is of `other`: {gallery, subject}, or an embedding as `side` writes it. Throws Refused. */
  async verify(embedding, other, policy) {
    return this.post("/v1/verify", { a: side(embedding, this.encoder), b: other, ...(policy && { policy }) });
  }

  /** Search a gallery for an embedding; options as POST …/identify takes them. Throws Refused. */
  async identify(embedding, gallery, options = {}) {
    const path = `/v1/galleries/${encodeURIComponent(gallery)}/identify`;
    return this.post(path, { query: side(embedding, this.encoder), ...options });
  }

  async post(path, body) {
    const headers = { "content-type": "application/json" };
    return (await ask(this.client, path, { method: "POST", headers, body: JSON.stringify(body) })).json();
  }
}

/**
 * Ask the server: `client` is {server, token}. Throws Refused for its problems, TypeError without a network. A download
 * that exceeds the rate of a token is asked for again when the server says that it may be; a question is not.
 */
export async function ask(client, path, { headers = {}, ...options } = {}) {
  const bearer = client.token ? { authorization: `Bearer ${client.token}` } : {};
  for (let tries = options.method ? 1 : 5; ; tries--) {
    const answer = await fetch(client.server + path, { ...options, headers: { ...headers, ...bearer } });
    if (answer.ok) return answer;
    const problem = await answer.json().catch(() => ({}));
    if (answer.status !== 429 || tries <= 1) throw new Refused(problem, answer.status);
    await new Promise((next) => setTimeout(next, 1000 * Number(answer.headers.get("retry-after") ?? 1)));
  }
}

/** Get JSON from the server. Throws as `ask`. */
export const getJson = async (client, path) => (await ask(client, path)).json();

async function firstStudent(client) {
  const { encoders } = await getJson(client, "/v1/encoders");
  const chosen = encoders.find((one) => one.role === "student") ?? encoders.find((one) => one.default);
  return chosen.id;
}

async function download(client, path, file, progress) {
  const answer = await ask(client, path), total = Number(answer.headers.get("content-length")), parts = [];
  let received = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts);
    parts.push(value);
    progress({ file, received: (received += value.length), total });
  }
}

async function requireDigest(buffer, wanted) {
  if (!globalThis.crypto?.subtle) return; // only where the page itself came over an untrusted way
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== wanted) throw new SelfTestFailed("the student is not the file that the server names. Load the page again.");
}
