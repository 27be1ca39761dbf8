// The live camera: detect in each frame, show one hint at a time, and give a good frame away at most once a second.

import { choose, crop, grab } from "./device/pkd-device.js";
import { $, mark } from "./view.js";

const ASK_EVERY = 1000; // milliseconds
const SEARCH_SIDE = 320; // of the copy that each frame is searched in; what is embedded is searched at full size

const WORDS = {
  NotAllowedError: "The browser may not use the camera. Allow it beside the address, or choose a file.",
  NotFoundError: "There is no camera here. Choose a file.",
  NotReadableError: "Another program uses the camera. Close it, or choose a file.",
  OverconstrainedError: "This camera gives no usable picture. Choose a file.",
};

/** Say why there is no camera here, or null where there is one. */
export const cameraFault = () =>
  navigator.mediaDevices?.getUserMedia ? null : "The camera needs https, or the address 127.0.0.1. Files work.";

/**
 * Start the camera. `device`: to detect with. `hint(text)`: what to do better, "" where all is well.
 * `take(image)`: embeds a frame and asks; awaited before the next frame. → {stop}. Throws Error in words for people.
 */
export async function startCamera(device, hint, take) {
  const video = $("video");
  let stream, running = true, asked = -Infinity;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, facingMode: "user" } });
  } catch (error) {
    throw new Error(WORDS[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
  video.srcObject = stream;
  await video.play();
  const [track] = stream.getVideoTracks();
  track.addEventListener("ended", () => hint("The camera has gone."));

  async function look() {
    const image = grab(video, video.videoWidth, video.videoHeight);
    const faces = await device.detector.detect(image, [SEARCH_SIDE]), face = choose(faces, image);
    if (!running) return;
    mark($("overlay"), image, faces, face);
    const advice = advise(image, faces, face, device.size);
    hint(advice);
    if (advice === "" && performance.now() - asked >= ASK_EVERY) {
      asked = performance.now();
      await take(image);
    }
  }

  (async () => {
    while (running) {
      const frame = new Promise((next) => (video.requestVideoFrameCallback ?? requestAnimationFrame).call(video, next));
      await Promise.race([frame, new Promise((next) => setTimeout(next, 500))]);
      if (running && !document.hidden && video.videoWidth) await look().catch((error) => hint(error.message));
    }
  })();

  return {
    stop() {
      running = false;
      stream.getTracks().forEach((one) => one.stop());
      video.srcObject = null;
    },
  };
}

/** Say the one thing that would help most, or "". */
export function advise(image, faces, face, size) {
  if (!face) return "No face is seen. Look into the camera.";
  const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
  if (faces.filter((one) => area(one) > 0.3 * area(face)).length > 1) return "Several people are seen. Only one should be.";
  if (face.box[2] - face.box[0] < 60) return "The face is small. Come closer.";
  const { light, sharpness } = measure(crop(image, face.landmarks, size));
  if (light < 45) return "It is dark. Find more light.";
  return sharpness < 15 ? "The picture is blurred. Hold still." : "";
}

/** Measure a crop: mean grey level, and the variance of its Laplacian, as the server's `sharpness`. */
export function measure({ width, height, data }) {
  const grey = new Float32Array(width * height);
  for (let n = 0; n < grey.length; n++) grey[n] = 0.299 * data[3 * n] + 0.587 * data[3 * n + 1] + 0.114 * data[3 * n + 2];
  let sum = 0, square = 0, count = 0;
  for (let y = 1; y < height - 1; y++) {
    for (let n = y * width + 1; n < y * width + width - 1; n++, count++) {
      const edge = grey[n - 1] + grey[n + 1] + grey[n - width] + grey[n + width] - 4 * grey[n];
      sum += edge;
      square += edge * edge;
    }
  }
  return { light: grey.reduce((all, one) => all + one, 0) / grey.length, sharpness: square / count - (sum / count) ** 2 };
}
