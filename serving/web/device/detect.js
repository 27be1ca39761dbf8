// Detection: a YuNet network → faces, by pkd's rules (docs/device.md, step 2; toolkit/encoders/detector.py).

import { resizeArea, roundEven } from "./align.js";

const WORK_SIDES = [640, 1920]; // longest side of the copy that is searched: the larger one where the first shows nobody
const MIN_SIDE = 16; // nothing smaller is searched
const FINE = 100; // faces smaller than this in the searched copy are searched again in a finer one
const OVERLAP = 0.3;
const STRIDES = [8, 16, 32];

/** Find faces in images. Calls wait for one another: the input's memory is used again. */
export class YuNet {
  /** `ort`: onnxruntime-web. `session`: of a YuNet whose input takes any multiple of 32. */
  constructor(ort, session, minScore = 0.5) {
    this.ort = ort;
    this.session = session;
    this.minScore = minScore;
    this.turn = Promise.resolve();
  }

  /**
   * Search an image → faces {box: [x1, y1, x2, y2], landmarks: [[x, y] × 5], score}, in its pixels.
   * `sides`: longest sides of the copies that are searched, one after the other until somebody is found.
   */
  detect(image, sides = WORK_SIDES) {
    const found = this.turn.then(() => this.find(image, sides));
    this.turn = found.catch(() => {});
    return found;
  }

  async find(image, sides) {
    if (Math.min(image.width, image.height) < MIN_SIDE) return [];
    for (const side of sides) {
      const scale = Math.min(1, side / Math.max(image.width, image.height));
      const found = await this.search(image, scale);
      if (found.length) {
        const small = (face) => scale < 1 && extent(face) * scale < FINE;
        const faces = [];
        for (const face of found) faces.push(small(face) ? await this.refine(image, face) : face);
        return faces;
      }
      if (scale === 1) break;
    }
    return [];
  }

  /** Find a tiny face again in a finer copy of its surroundings, where its points are exact. */
  async refine(image, face) {
    const reach = 1.5 * extent(face), [cx, cy] = centre(face);
    const x = Math.max(0, Math.floor(cx - reach)), y = Math.max(0, Math.floor(cy - reach));
    const right = Math.min(image.width, Math.ceil(cx + reach)), bottom = Math.min(image.height, Math.ceil(cy + reach));
    if (Math.min(right - x, bottom - y) < MIN_SIDE) return face;
    const part = cut(image, x, y, right - x, bottom - y);
    const finer = await this.search(part, Math.min(1, (3 * FINE) / Math.max(part.width, part.height)));
    const same = finer
      .map(({ box, landmarks, score }) => ({
        box: box.map((value, n) => value + (n % 2 ? y : x)),
        landmarks: landmarks.map(([px, py]) => [px + x, py + y]),
        score,
      }))
      .filter((one) => Math.hypot(centre(one)[0] - cx, centre(one)[1] - cy) < 0.5 * extent(face));
    return same.reduce((best, one) => (best === null || one.score > best.score ? one : best), null) ?? face;
  }

  async search(image, scale) {
    const width = Math.max(MIN_SIDE, roundEven(image.width * scale));
    const height = Math.max(MIN_SIDE, roundEven(image.height * scale));
    const copy = scale === 1 ? image : resizeArea(image, width, height);
    const rows = await this.run(copy);
    const sx = image.width / width, sy = image.height / height;
    return rows.map(({ box: [x, y, w, h], points, score }) => ({
      box: [x * sx, y * sy, (x + w) * sx, (y + h) * sy],
      landmarks: points.map(([px, py]) => [(px + 0.5) * sx - 0.5, (py + 0.5) * sy - 0.5]),
      score: Math.min(1, score),
    }));
  }

  /** Run the network on one copy, padded with black to multiples of 32, and decode its three strides. */
  async run({ width, height, data }) {
    const across = Math.ceil(width / 32) * 32, down = Math.ceil(height / 32) * 32, plane = across * down;
    if (this.input?.length !== 3 * plane) this.input = new Float32Array(3 * plane);
    this.input.fill(0);
    for (let y = 0, from = 0; y < height; y++) {
      for (let x = 0, to = y * across; x < width; x++, to++, from += 3) {
        this.input[to] = data[from + 2]; // blue first
        this.input[plane + to] = data[from + 1];
        this.input[2 * plane + to] = data[from];
      }
    }
    const name = this.session.inputNames[0];
    const output = await this.session.run({ [name]: new this.ort.Tensor("float32", this.input, [1, 3, down, across]) });
    const found = [];
    for (const stride of STRIDES) {
      const [cls, obj, box, kps] = ["cls", "obj", "bbox", "kps"].map((part) => output[`${part}_${stride}`].data);
      const columns = across / stride;
      for (let n = 0; n < cls.length; n++) {
        const score = Math.fround(Math.sqrt(unit(cls[n]) * unit(obj[n])));
        if (!(score >= this.minScore)) continue;
        const c = n % columns, r = Math.floor(n / columns);
        const w = Math.exp(box[4 * n + 2]) * stride, h = Math.exp(box[4 * n + 3]) * stride;
        const x = (c + box[4 * n]) * stride - w / 2, y = (r + box[4 * n + 1]) * stride - h / 2;
        const points = [0, 2, 4, 6, 8].map((k) => [
          (kps[10 * n + k] + c) * stride, (kps[10 * n + k + 1] + r) * stride,
        ]);
        if ([x, y, w, h, ...points.flat()].every(Number.isFinite)) found.push({ box: [x, y, w, h], points, score });
      }
    }
    return suppress(found);
  }
}

/** Choose the face that a photograph is of: the largest; at the rim a fifth of its area counts. Null for none. */
export function choose(faces, { width, height }) {
  const weight = (face) => {
    const [x1, y1, x2, y2] = face.box, [cx, cy] = centre(face);
    const dx = (cx - width / 2) / (width / 2), dy = (cy - height / 2) / (height / 2);
    return ((x2 - x1) * (y2 - y1)) / (1 + 4 * (dx * dx + dy * dy));
  };
  return faces.reduce((best, face) => (best === null || weight(face) > weight(best) ? face : best), null);
}

/** Drop every box that overlaps a better one. OpenCV compares boxes cut to whole pixels, and so does this. */
function suppress(found) {
  const ordered = found.map((one) => ({ ...one, whole: one.box.map(Math.trunc) })).sort((a, b) => b.score - a.score);
  const kept = [];
  for (const one of ordered) if (kept.every((other) => overlap(one.whole, other.whole) <= OVERLAP)) kept.push(one);
  return kept;
}

function overlap([ax, ay, aw, ah], [bx, by, bw, bh]) {
  const width = Math.max(0, Math.min(ax + aw, bx + bw) - Math.max(ax, bx));
  const height = Math.max(0, Math.min(ay + ah, by + bh) - Math.max(ay, by));
  const union = aw * ah + bw * bh - width * height;
  return union > 0 ? (width * height) / union : 1;
}

function cut({ width, data }, x, y, across, down) {
  const made = new Uint8Array(across * down * 3);
  for (let row = 0; row < down; row++) {
    const from = ((y + row) * width + x) * 3;
    made.set(data.subarray(from, from + across * 3), row * across * 3);
  }
  return { width: across, height: down, data: made };
}

const unit = (value) => Math.min(1, Math.max(0, value));
const extent = ({ box }) => Math.max(box[2] - box[0], box[3] - box[1]);
const centre = ({ box }) => [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
