// What every page is made of. Text is only ever set as text.

const page = document.getElementById("page");
export const root = document.querySelector("meta[name=airflow-root]").content;

// What would not be seen, or would turn around what is beside it, as an escape: names and errors are anybody's.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
export const visible = (text) => text.replace(UNSEEN, (each) => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`);
const shown = (child) => (typeof child === "string" ? visible(child) : child);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false).map(shown));
  return made;
}

export function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map(shown));
  return made;
}

export const show = (...children) => page.replaceChildren(...children.flat(Infinity).filter(Boolean));
export const encoded = (parts) => parts.map(encodeURIComponent).join("/");
export const link = (parts, text, attributes = {}) => element("a", { href: `#/${encoded(parts)}`, ...attributes }, text);

export class Refused extends Error {}

export async function ask(...parts) {
  const last = parts.at(-1);
  const query = typeof last === "object" ? `?${new URLSearchParams(Object.entries(parts.pop()).filter(([, value]) => value))}` : "";
  const answer = await fetch(`api/v1/${encoded(parts)}${query}`, { credentials: "same-origin", headers: { Accept: "application/json" } });
  if (answer.ok) return answer.json();
  if (answer.status === 401) throw new Refused("You are not logged in, or no longer. Log in to Airflow, and load this page again.");
  if (answer.status === 403) throw new Refused("You may not read this connection. Who administers this Airflow can grant it.");
  const said = await answer.json().catch(() => ({}));
  if (Array.isArray(said.detail)) throw new Refused(`This address says something that cannot be: ${said.detail.map((each) => each.msg).join("; ")}.`);
  throw new Refused(typeof said.detail === "string" ? said.detail : `The server answered ${answer.status}.`);
}

// Airflow itself, by its own API and with the rights of whoever looks; null where it does not answer as asked.
export async function airflow(parts, body) {
  const answer = await fetch(`${root}/api/v2/${encoded(parts)}`, {
    credentials: "same-origin",
    method: body ? "POST" : "GET",
    // What a form of another site could not send: the browser would ask first, and Airflow would refuse.
    headers: { Accept: "application/json", ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined,
  });
  if (answer.ok) return answer.json();
  if (!body) return null;
  const said = await answer.json().catch(() => ({}));
  const detail = typeof said.detail === "string" ? said.detail : said.detail?.reason;
  throw new Refused(answer.status === 403 ? "You may not trigger this DAG." : `Airflow refused it: ${detail ?? answer.status}.`);
}

// Again and again while somebody looks at this page, at the earliest after so many milliseconds.
export function whileShown(milliseconds, isNow, look) {
  const again = async () => {
    if (!isNow()) return;
    if (!document.hidden) {
      try {
        if (await look() === false) return;
      } catch {
        // The next look may go better.
      }
    }
    setTimeout(again, milliseconds);
  };
  setTimeout(again, milliseconds);
}

// What others may have written into a record is not always what we write.
export const object = (value) => (value !== null && typeof value === "object" && !Array.isArray(value) ? value : {});
export const array = (value) => (Array.isArray(value) ? value : []);

export function connectionPicker(connections, current) {
  const known = connections.includes(current);
  const made = element("select", { "aria-label": "Connection" },
    known ? null : element("option", { value: "", selected: true, disabled: true }, "Connection"),
    connections.map((each) => element("option", { value: each, selected: each === current }, each)));
  made.addEventListener("change", () => {
    location.hash = `#/${encodeURIComponent(made.value)}`;
  });
  return made;
}

export const number = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en"));

export function bytes(value) {
  if (value === null || value === undefined) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(value, 1)) / 10));
  const scaled = value / 1024 ** power;
  return `${scaled >= 100 || power === 0 ? Math.round(scaled) : scaled.toFixed(1)} ${units[power]}`;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "";
  if (value < 1000) return `${value < 10 && value % 1 ? value.toFixed(1) : Math.round(value)} ms`;
  const seconds = value / 1000;
  return seconds < 120 ? `${seconds.toFixed(seconds < 10 ? 2 : 1)} s` : age(seconds);
}

export function age(seconds) {
  if (seconds < 1) return "less than 1 s";
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// As Airflow writes moments, in the time zone that is chosen there; in the browser's own where none is.
function chosenZone() {
  try {
    const chosen = JSON.parse(localStorage.getItem("timezone"));
    new Intl.DateTimeFormat("en", { timeZone: chosen });
    return chosen;
  } catch {
    return undefined;
  }
}
export const timeZone = chosenZone() ?? new Intl.DateTimeFormat().resolvedOptions().timeZone;
const moments = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "medium", timeZone });
export const moment = (value) => moments.format(new Date(value));

export function time(value) {
  return value ? element("time", { datetime: value, title: value }, moment(value)) : "";
}

// Names and values; and such as are filled in later, whose <dd> is given.
export function facts(pairs, later = []) {
  return element("dl", { class: "facts" }, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, ...[value].flat()))),
  later.map(([name, place]) => element("div", { class: "wide" }, element("dt", {}, name), place)));
}

export function section(title, ...content) {
  return element("section", {}, element("h2", {}, title), ...content);
}

export function table(heads, rows) {
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, rows)));
}

// How far a run is: against its usual time, and what it does.
export function progress(run) {
  const usual = run.usual_seconds;
  return element("span", { class: "progress" },
    usual ? element("progress", { max: 1, value: Math.min(run.seconds / usual, 0.99), "aria-label": "compared with its usual time" }) : null,
    element("span", { class: "muted" }, ` for ${age(run.seconds)}`, usual ? ` of usually ${age(usual)}` : ""));
}

export const diff = (lines) => element("pre", { class: "diff" }, lines.map((line) => element("span", { class: line.startsWith("+") ? "added" : line.startsWith("-") ? "removed" : "" }, `${line}\n`)));

export function sparkline(values) {
  if (values.length < 2) return "";
  const [width, height] = [80, 18];
  const most = Math.max(...values, 1);
  const points = values.map((value, index) => `${((index / (values.length - 1)) * width).toFixed(1)},${(height - 1 - (value / most) * (height - 2)).toFixed(1)}`);
  return drawn("svg", { class: "sparkline", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    drawn("polyline", { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.2 }));
}
