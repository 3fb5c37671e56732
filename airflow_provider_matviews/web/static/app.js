// Which page is shown: the address says so, after its #.

import { showGraph } from "./graph.js";
import { showViews } from "./list.js";
import { ask, element, link, Refused, show } from "./parts.js";
import { showRun, showRuns } from "./runs.js";
import { followTheme } from "./theme.js";
import { showView } from "./view.js";

const page = document.getElementById("page");

async function showConnections() {
  const { connections } = await ask("connections");
  if (connections.length) {
    history.replaceState(null, "", `#/${encodeURIComponent(connections[0])}`);
    await showViews(connections[0], connections);
    return;
  }
  document.title = "Materialized views";
  show(
    element("h1", {}, "Materialized views"),
    element("p", { class: "notice" }, "There is no connection that is shown here and that you may read. ",
      "The option connections in the section [matviews] of Airflow's configuration names those that are shown."));
}

async function showConnection(connection) {
  const { connections } = await ask("connections");
  await showViews(connection, connections);
}

const routes = [
  [/^#\/([^/]+)\/runs\/(\d+)$/, showRun],
  [/^#\/([^/]+)\/runs$/, showRuns],
  [/^#\/([^/]+)\/graph$/, showGraph],
  [/^#\/([^/]+)\/views\/([^/]+)\/([^/]+)$/, showView],
  [/^#\/([^/]+)$/, showConnection],
  [/^$|^#?\/?$/, showConnections],
];

async function route() {
  const address = location.hash;
  for (const [pattern, open] of routes) {
    const found = pattern.exec(address);
    if (!found) continue;
    page.setAttribute("aria-busy", "true");
    try {
      await open(...found.slice(1).map(decodeURIComponent));
    } catch (error) {
      if (location.hash !== address) return;
      show(element("h1", {}, "Materialized views"),
        element("p", { class: "notice error", role: "alert" }, error instanceof Refused ? error.message : `This page does not work: ${error}`));
    } finally {
      page.removeAttribute("aria-busy");
    }
    page.focus({ preventScroll: true });
    return;
  }
  show(element("h1", {}, "Materialized views"), element("p", { class: "notice" }, "There is no such page. ", link([], "Begin here.")));
}

followTheme();
addEventListener("hashchange", route);
route();
