// Small helpers to write into the page. Text is set as text, never as HTML: names may hold anything.

export const $ = (id) => document.getElementById(id);

export function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** A cell's content: text, or nodes in a row. */
function cell(tag, content, className = "") {
  const made = element(tag, "", className);
  made.append(...[content].flat().map((one) => (one instanceof Node ? one : String(one ?? "–"))));
  return made;
}

export function fillTable(table, columns, rows, empty) {
  const head = element("thead"), body = element("tbody");
  const names = element("tr");
  names.append(...columns.map((name, at) => Object.assign(cell("th", name, at ? "" : "left"), { scope: "col" })));
  head.append(names);
  for (const row of rows) {
    const line = element("tr");
    line.append(...row.map((one) => cell("td", one)));
    body.append(line);
  }
  if (!rows.length) {
    const line = element("tr"), only = cell("td", empty, "left");
    only.colSpan = columns.length;
    line.append(only);
    body.append(line);
  }
  table.replaceChildren(head, body);
  markOverflow(table);
}

export function markOverflow(table) {
  const region = table.parentElement;
  if (!region.nextElementSibling?.classList.contains("hint-scroll")) region.after(element("p", "More columns to the right: scroll.", "small hint-scroll"));
  requestAnimationFrame(() => region.classList.toggle("overflows", region.scrollWidth > region.clientWidth + 2));
}

export function button(text, act, className = "quiet") {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

export const short = (id) => id.replace(/@sha256:([0-9a-f]{10}).*/, "@$1");
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const rate = (value) => (value >= 0.01 ? percent(value, 0) : value.toExponential(0).replace("e-", "e−"));
export const count = (value) => Number(value).toLocaleString("en");
export const moment = (text) => (text ? new Date(text).toISOString().replace("T", " ").slice(0, 19) : "–");

export function age(text, now = Date.now()) {
  const days = Math.floor((now - new Date(text)) / 86400000);
  if (days < 1) return "today";
  return days < 60 ? `${days} days old` : `${Math.round(days / 30.4)} months old`;
}

export function receipt(box, title, answer) {
  const facts = [
    `${count(answer.templates)} templates, ${count(answer.rows)} rows removed from ${answer.covers.join(", ")}`,
    `audit record ${answer.sequence}`,
  ];
  box.replaceChildren(element("b", title), ...facts.map((one) => element("div", one)), element("div", answer.hash, "mono"), element("div", "Keep this receipt: it proves the deletion, and that the log was not rewritten before it.", "small"));
  box.hidden = false;
}
