// Which page is shown: the address says so, after its #.

import { showGraph } from "./graph.js";
import { showViews } from "./list.js";
import { ask, connectionPicker, element, link, Refused, show } from "./parts.js";
import { showRun, showRuns } from "./runs.js";
import { followTheme } from "./theme.js";
import { showView } from "./view.js";

const page = document.getElementById("page");

async function showConnections(isNow) {
  const { connections } = await ask("connections");
  if (!isNow()) return;
  if (connections.length) {
    history.replaceState(null, "", `#/${encodeURIComponent(connections[0])}`);
    await showViews(isNow, connections[0], connections);
    return;
  }
  document.title = "Materialized views";
  show(
    element("h1", {}, "Materialized views"),
    element("p", { class: "notice" }, "There is no connection that is shown here and that you may read. ",
      "The option connections in the section [matviews] of Airflow's configuration names those that are shown."));
}

async function showConnection(isNow, connection) {
  const { connections } = await ask("connections");
  await showViews(isNow, connection, connections);
}

const routes = [
  [/^#\/([^/]+)\/runs\/(\d+)$/, showRun],
  [/^#\/([^/]+)\/runs$/, showRuns],
  [/^#\/([^/]+)\/graph$/, showGraph],
  [/^#\/([^/]+)\/views\/([^/]+)\/([^/]+)$/, showView],
  [/^#\/([^/]+)$/, showConnection],
  [/^$|^#?\/?$/, showConnections],
];

function asked() {
  for (const [pattern, open] of routes) {
    const found = pattern.exec(location.hash);
    if (!found) continue;
    try {
      return [open, found.slice(1).map(decodeURIComponent)];
    } catch {
      // A % that begins nothing.
      return null;
    }
  }
  return null;
}

// What is wrong, and the ways on from there: of several connections others may well be there.
async function showTrouble(notice, isNow) {
  const [current] = asked()?.[1] ?? [];
  const { connections } = await ask("connections").catch(() => ({ connections: [] }));
  if (!isNow()) return;
  document.title = "Materialized views";
  show(element("nav", { "aria-label": "Up" }, current === undefined ? link([], "← Materialized views") : link([current], "← All views")),
    element("h1", {}, "Materialized views"),
    connections.length > (connections.includes(current) ? 1 : 0) ? element("div", { class: "tools" }, connectionPicker(connections, current)) : null,
    notice);
}

let latest = 0;

async function route() {
  latest += 1;
  const mine = latest;
  const isNow = () => mine === latest;
  page.setAttribute("aria-busy", "true");
  const found = asked();
  try {
    if (found) await found[0](isNow, ...found[1]);
    else await showTrouble(element("p", { class: "notice" }, "There is no such page."), isNow);
  } catch (error) {
    await showTrouble(element("p", { class: "notice error", role: "alert" }, error instanceof Refused ? error.message : `This page does not work: ${error}`), isNow);
  }
  if (!isNow()) return;
  page.removeAttribute("aria-busy");
  page.focus({ preventScroll: true });
}

// Airflow around this page does not know where in it one was: when all of it is loaded again, one is there again.
function comeBack() {
  const PLACE = "matviews-place";
  try {
    if (window.parent === window) return;
    const loaded = String(window.parent.performance.timeOrigin);
    const { hash, from } = JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
    const reloaded = window.parent.performance.getEntriesByType("navigation")[0]?.type === "reload";
    if (reloaded && hash && from !== loaded && !location.hash) history.replaceState(null, "", hash);
    const keep = () => sessionStorage.setItem(PLACE, JSON.stringify({ hash: location.hash, from: loaded }));
    keep();
    addEventListener("hashchange", keep);
  } catch {
    // Where that may not be known, one begins at the list.
  }
}

followTheme();
comeBack();
addEventListener("hashchange", route);
route();
