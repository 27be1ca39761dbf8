// The console: ask for the key where one is needed, and show one section at a time.

import { ask, Refused, useKey } from "./api.js";
import { $ } from "./view.js";

/** Run an action of the page; what is refused or fails is told in words, with what would work. */
export function guarded(act) {
  return async (...given) => {
    $("fault").hidden = true;
    try {
      await act(...given);
    } catch (error) {
      if (error instanceof Refused && error.type === "auth") return forget(error.message);
      const works = error.problem?.works;
      $("fault").textContent = error.message + (works ? ` What works: ${JSON.stringify(works)}` : "");
      $("fault").hidden = false;
      $("fault").scrollIntoView({ block: "nearest" });
    }
  };
}

const sections = {
  encoders: async () => (await import("./encoders.js")).loadEncoders(),
  galleries: async () => (await import("./galleries.js")).loadGalleries(),
  audit: async () => (await import("./audit.js")).loadAudit(),
  now: async () => (await import("./now.js")).startNow(),
};

const show = guarded(async (name) => {
  for (const tab of document.querySelectorAll("[data-tab]")) tab.setAttribute("aria-pressed", String(tab.dataset.tab === name));
  for (const section of Object.keys(sections)) $(section).hidden = section !== name;
  (await import("./now.js")).stopNow();
  await sections[name]();
});

function forget(why = "") {
  useKey(null);
  $("work").hidden = $("tabs").hidden = true;
  $("ask").hidden = false;
  $("ask-says").textContent = why;
  $("key").value = "";
  $("key").focus();
  $("server").textContent = "This server asks for a key.";
}

async function begin() {
  const { encoders } = await ask("GET", "/v1/encoders");
  $("ask").hidden = true;
  $("work").hidden = $("tabs").hidden = false;
  $("server").textContent = `${location.host}: ${encoders.length} encoder${encoders.length === 1 ? "" : "s"}`;
  await show("encoders");
}

for (const tab of document.querySelectorAll("[data-tab]")) tab.addEventListener("click", () => show(tab.dataset.tab));
$("leave").addEventListener("click", () => location.reload());
$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  guarded(begin)();
});
guarded(begin)();
