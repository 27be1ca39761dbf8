// Does each certificate still hold: what the server counted for every ordered pair, with a verdict in plain words.

import { ask, part } from "./api.js";
import { $, count, element, fillTable, moment, percent, rate, short } from "./view.js";

const KINDS = { identify: "search", verify: "verification" };
const nameOf = (one) => `${short(one.query)}__${short(one.gallery)}`;

/** Ask for every certificate's state, and write the table; a certificate that cannot be asked for says why. */
export async function showDrift(certificates) {
  const states = await Promise.all(
    certificates.map((one) => ask("GET", `/v1/certificates/${part(nameOf(one))}/drift`).catch((error) => ({ ...one, error }))),
  );
  states.sort((a, b) => Number(Boolean(b.alarm)) - Number(Boolean(a.alarm)));
  fillTable($("drift-list"), ["asks → enrolled", "verdict", "impostors that reached it"], states.map(row), "No certificate is loaded.");
}

function row(state) {
  const pair = [`${short(state.query)} → ${short(state.gallery)}`];
  if (state.error) return [pair, [element("b", "not known"), element("small", state.error.message)], "–"];
  return [pair, verdict(state), state.observed.length ? state.observed.map(pointOf) : "–"];
}

function verdict(state) {
  const surely = percent(1 - state.false_alarm_rate, 0);
  if (!state.since) return [element("b", "nothing seen yet"), element("small", "No decision that could tell has been made.")];
  const since = element("small", `Watched since ${moment(state.since)} UTC.`);
  if (state.alarm)
    return [
      element("b", "broken: more impostors than certified", "alarm"),
      element("small", `A certificate that holds never says this with ${surely} probability. Look for people enrolled twice (Galleries, review), then evaluate on photographs of today’s cameras and people.`),
      since,
    ];
  return [
    element("b", "holds so far"),
    element("small", `Evidence against it ${state.evidence.toFixed(1)}; an alarm from ${count(state.alarm_at)} on. Few observations prove little.`),
    since,
  ];
}

function pointOf(point) {
  const many = point.observations === 1 ? "" : point.kind === "identify" ? "es" : "s";
  return element("small", `FMR ${rate(point.fmr)}: ${count(point.reached)} of ${count(point.observations)} ${KINDS[point.kind]}${many}; at most ${point.at_most.toPrecision(2)} promised`);
}
