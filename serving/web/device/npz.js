// Read numpy's .npz: the golden crops and embeddings of a bundle, which are the self-test of its encoder.

const END = 0x06054b50, ENTRY = 0x02014b50;

/** Read an archive of arrays → {name: {shape, data}}, for uint8, float32 and float64. Throws Error where it is none. */
export async function readNpz(buffer) {
  const view = new DataView(buffer), arrays = {};
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== END) end--;
  if (end < 0) throw new Error("golden.npz: no archive. Download the bundle again.");
  let at = view.getUint32(end + 16, true);
  for (let n = view.getUint16(end + 10, true); n > 0; n--) {
    if (view.getUint32(at, true) !== ENTRY) throw new Error("golden.npz: broken archive. Download the bundle again.");
    const method = view.getUint16(at + 10, true), packed = view.getUint32(at + 20, true);
    const [name, extra, comment] = [28, 30, 32].map((place) => view.getUint16(at + place, true));
    const local = view.getUint32(at + 42, true);
    const title = new TextDecoder().decode(new Uint8Array(buffer, at + 46, name));
    const from = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const raw = new Blob([new Uint8Array(buffer, from, packed)]);
    const stream = method === 8 ? raw.stream().pipeThrough(new DecompressionStream("deflate-raw")) : raw.stream();
    arrays[title.replace(/\.npy$/, "")] = readNpy(await new Response(stream).arrayBuffer());
    at += 46 + name + extra + comment;
  }
  return arrays;
}

function readNpy(buffer) {
  const view = new DataView(buffer), wide = view.getUint8(6) > 1;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true), start = (wide ? 12 : 10) + length;
  const header = new TextDecoder().decode(new Uint8Array(buffer, start - length, length));
  const kind = /'descr': '([^']+)'/.exec(header)?.[1], shape = /'shape': \(([^)]*)\)/.exec(header)?.[1];
  const Numbers = { "|u1": Uint8Array, "<f4": Float32Array, "<f8": Float64Array }[kind];
  if (!Numbers || shape === undefined || /'fortran_order': True/.test(header)) {
    throw new Error(`golden.npz: holds an array of ${kind}, which is not read here.`);
  }
  return { shape: shape.split(",").filter((part) => part.trim()).map(Number), data: new Numbers(buffer.slice(start)) };
}
