// Alignment: five points → similarity → sampling → crop. docs/device.md, steps 3 and 4, states the arithmetic.
//
// An image is {width, height, data}: data holds height × width × 3 bytes, red first. The centre of the pixel in column i
// and row j lies at (i, j). Points are [[x, y], …] in pixels: image-left eye, other eye, nose, mouth corners.

const TEMPLATE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];

/** Give the five points of an aligned crop of `size` pixels. */
export const template = (size) => TEMPLATE.map(([x, y]) => [(x * size) / 112, (y * size) / 112]);

/** Raise to the nearest whole number, halves to even, as Python's round does. */
export function roundEven(value) {
  const floor = Math.floor(value), rest = value - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

/**
 * Fit the similarity that takes five points to the template of a crop → [[a, −b, tx], [b, a, ty]].
 * Throws RangeError where the points are not finite or all coincide.
 */
export function similarity(points, size) {
  const wanted = template(size);
  if (points.length !== wanted.length || !points.flat().every(Number.isFinite)) {
    throw new RangeError(`landmarks: ${points.length} points, of which some are no numbers. Give five finite points.`);
  }
  const mean = (list, axis) => list.reduce((sum, one) => sum + one[axis], 0) / list.length;
  const [px, py, qx, qy] = [mean(points, 0), mean(points, 1), mean(wanted, 0), mean(wanted, 1)];
  let cos = 0, sin = 0, length = 0;
  points.forEach(([x, y], n) => {
    const [sx, sy, tx, ty] = [x - px, y - py, wanted[n][0] - qx, wanted[n][1] - qy];
    cos += sx * tx + sy * ty;
    sin += sx * ty - sy * tx;
    length += sx * sx + sy * sy;
  });
  if (length / points.length < 1e-6) throw new RangeError("landmarks: they all lie on one point. Use another detector.");
  const a = cos / length, b = sin / length;
  return [[a, -b, qx - a * px + b * py], [b, a, qy - b * px - a * py]];
}

/** Cut the aligned face of size × size pixels out of an image; a face of over twice that size is averaged down first. */
export function crop(image, points, size) {
  const matrix = similarity(points, size);
  const scale = Math.hypot(matrix[0][0], matrix[1][0]);
  if (scale >= 0.5) return warp(image, matrix, size);
  const width = Math.max(1, roundEven(image.width * 2 * scale));
  const height = Math.max(1, roundEven(image.height * 2 * scale));
  const moved = points.map(([x, y]) => [
    ((x + 0.5) * width) / image.width - 0.5, ((y + 0.5) * height) / image.height - 0.5,
  ]);
  return warp(resizeArea(image, width, height), similarity(moved, size), size);
}

/** Cut the same crop by a matrix of `similarity`: the conformance kit gives no landmarks with it. */
export function cropBy(image, matrix, size) {
  const [[a, , tx], [b, , ty]] = matrix, square = a * a + b * b;
  const points = template(size).map(([x, y]) => [
    (a * (x - tx) + b * (y - ty)) / square, (a * (y - ty) - b * (x - tx)) / square,
  ]);
  return crop(image, points, size);
}

/** Sample an image bilinearly under a matrix that takes its points to the crop; beyond its border it is black. */
export function warp(image, matrix, size) {
  const { width, height, data } = image, made = new Uint8Array(size * size * 3);
  const [[a, c, tx], [b, d, ty]] = matrix, det = a * d - b * c;
  for (let v = 0, to = 0; v < size; v++) {
    for (let u = 0; u < size; u++, to += 3) {
      const x = (d * (u - tx) - c * (v - ty)) / det, y = (a * (v - ty) - b * (u - tx)) / det;
      const left = Math.floor(x), top = Math.floor(y);
      if (left < -1 || top < -1 || left >= width || top >= height) continue;
      const fx = x - left, fy = y - top, from = (top * width + left) * 3, below = from + width * 3;
      const hasLeft = left >= 0, hasRight = left + 1 < width, hasTop = top >= 0, hasBottom = top + 1 < height;
      const nw = hasTop && hasLeft ? (1 - fx) * (1 - fy) : 0, ne = hasTop && hasRight ? fx * (1 - fy) : 0;
      const sw = hasBottom && hasLeft ? (1 - fx) * fy : 0, se = hasBottom && hasRight ? fx * fy : 0;
      for (let k = 0; k < 3; k++) {
        let sum = 0; // an absent neighbour must not be read: NaN times 0 is NaN
        if (nw) sum += nw * data[from + k];
        if (ne) sum += ne * data[from + 3 + k];
        if (sw) sum += sw * data[below + k];
        if (se) sum += se * data[below + 3 + k];
        made[to + k] = Math.round(sum);
      }
    }
  }
  return { width: size, height: size, data: made };
}

/** Shrink an image by averaging the area that each new pixel covers, as OpenCV's INTER_AREA does. */
export function resizeArea(image, width, height) {
  if (width === image.width && height === image.height) return image;
  const columns = shares(image.width, width), rows = shares(image.height, height);
  const { data } = image, made = new Uint8Array(width * height * 3);
  const line = new Float32Array(width * 3), sums = new Float32Array(width * 3);
  const halves = image.width === 2 * width && image.height === 2 * height; // where OpenCV rounds .5 up, not to even
  const round = halves ? Math.round : roundEven;
  let ready = -1;
  for (let y = 0; y < height; y++) {
    sums.fill(0);
    for (let n = rows.first[y]; n < rows.first[y + 1]; n++) {
      if (rows.source[n] !== ready) averageRow(data, (ready = rows.source[n]) * image.width * 3, columns, line);
      const share = rows.share[n];
      for (let i = 0; i < line.length; i++) sums[i] += share * line[i];
    }
    for (let i = 0, to = y * width * 3; i < sums.length; i++, to++) made[to] = round(sums[i]);
  }
  return { width, height, data: made };
}

function averageRow(data, start, { first, source, share }, line) {
  for (let x = 0, to = 0; x < first.length - 1; x++, to += 3) {
    let r = 0, g = 0, b = 0;
    for (let n = first[x]; n < first[x + 1]; n++) {
      const from = start + source[n] * 3, part = share[n];
      r += part * data[from];
      g += part * data[from + 1];
      b += part * data[from + 2];
    }
    line[to] = r;
    line[to + 1] = g;
    line[to + 2] = b;
  }
}

/** List which source pixels each new one covers, and by what share of it. */
function shares(from, to) {
  const scale = from / to, first = new Uint32Array(to + 1), source = [], share = [];
  const add = (pixel, part) => {
    source.push(pixel);
    share.push(part);
  };
  for (let n = 0; n < to; n++) {
    first[n] = source.length;
    const begin = n * scale, end = begin + scale, extent = Math.min(scale, from - begin);
    const last = Math.min(Math.floor(end), from - 1), whole = Math.min(Math.ceil(begin), last);
    if (whole - begin > 1e-3) add(whole - 1, (whole - begin) / extent);
    for (let pixel = whole; pixel < last; pixel++) add(pixel, 1 / extent);
    if (end - last > 1e-3) add(last, Math.min(end - last, 1, extent) / extent);
  }
  first[to] = source.length;
  return { first, source: Uint32Array.from(source), share: Float32Array.from(share) };
}
