// One view: how its refreshes went, what it should be and what it is.

import { actionBar } from "./actions.js";
import { drawHistory } from "./charts.js";
import { comparison } from "./differences.js";
import { drawGraph } from "./graph.js";
import { age, airflow, ask, bytes, element, facts, link, milliseconds, number, object, progress, section, show, table, time, whileShown } from "./parts.js";
import { runTable } from "./runs.js";
import { highlighted } from "./sql.js";

const LONGEST_HISTORY = 500;
const RUNS_SHOWN = 20;

function list(items) {
  return items.length ? element("ul", {}, items.map((item) => element("li", {}, element("code", {}, item)))) : element("p", { class: "muted" }, "None.");
}

function declared({ definition, drift, drift_run_id: runId, drift_mended: mended }, connection, of) {
  const parts = [];
  if (definition.sql) parts.push(element("pre", { class: "sql" }, highlighted(definition.sql)));
  const declaration = Object.fromEntries(Object.entries(object(definition.declaration)).filter(([name, value]) => name !== "sql" && name !== "name"
    && value !== null && !(typeof value === "object" && Object.keys(value).length === 0)));
  if (Object.keys(declaration).length) parts.push(element("details", {}, element("summary", {}, "What else is declared"), element("pre", {}, JSON.stringify(declaration, null, 2))));
  if (!definition.managed) parts.push(element("p", { class: "muted" }, "It was never declared to this provider, or as managed by somebody else: it is refreshed, and never altered."));
  if (drift?.length) {
    parts.push(element("p", {}, element("strong", {}, "Differed from the database"), ", as ", link([connection, "runs", runId], `run ${runId}`), mended ? " found and put right:" : " found and left:"),
      list(drift));
  } else if (drift) {
    parts.push(element("p", { class: "muted" }, "Nothing differed from the database when ", link([connection, "runs", runId], `run ${runId}`), " last looked."));
  }
  if (Object.keys(object(definition.declaration)).length) parts.push(comparison(connection, of));
  return section("Definition", parts);
}

function described(connection, found) {
  return [
    section("In the database",
      facts([
        ["Owner", found.owner],
        ["Holds data", found.populated ? "yes" : "no: it answers no query before its first refresh"],
        ["Rows, estimated", number(found.estimated_rows)],
      ]),
      element("details", {}, element("summary", {}, "The query, as PostgreSQL words it"), element("pre", { class: "sql" }, highlighted(found.query))),
      element("h3", {}, "Columns"), table(["Name", "Type"], found.columns.map((column) => element("tr", {}, element("td", {}, column.name), element("td", {}, element("code", {}, column.type))))),
      element("h3", {}, "Indexes"), list(found.indexes),
      element("h3", {}, "Reads"), list(found.sources),
      element("h3", {}, "Is read by"), list(found.dependents),
      element("h3", {}, "Grants"), list(found.attachments.filter((each) => each.kind === "privilege").map((each) => each.description)),
      element("h3", {}, "Has"), list(found.attachments.filter((each) => each.kind !== "privilege").map((each) => each.description))),
  ];
}

async function nextRun(dagId) {
  const dag = dagId ? await airflow(["dags", dagId]) : null;
  if (!dag) return "not known: no DAG of this Airflow refreshed it last";
  if (dag.is_paused) return `${dagId} is paused`;
  return dag.next_dagrun_run_after ? time(dag.next_dagrun_run_after) : `when ${dagId} is triggered`;
}

// What runs now, with how far it is; when it ends the page is drawn anew.
function followRuns(isNow, connection, known, place, again) {
  let seen = known.running.some((run) => !run.lost);
  const look = async () => {
    const { runs } = await ask("connections", connection, "running");
    if (!isNow()) return false;
    const mine = runs.filter((run) => run.schema_name === known.schema_name && run.view_name === known.view_name);
    if (seen && !mine.length && runs.length < 20) return again(place);
    seen ||= mine.length > 0;
    place.replaceChildren(...mine.map((run) => element("p", {}, link([connection, "runs", run.run_id], `Run ${run.run_id}, ${run.operation}`), " ", progress(run), " ", run.said ?? "")));
    return true;
  };
  look().then((goOn) => goOn && whileShown(3000, isNow, look), () => whileShown(3000, isNow, look));
}

// Anything that one would lose if the page were drawn anew.
const inUse = () => document.querySelector("#page details[open], #page .changes, dialog") !== null
  || [...document.querySelectorAll("#page select")].some((each) => each.selectedIndex > 0);

let asks = 0;
let drawings = 0;

export async function showView(shown, connection, schema, name) {
  asks += 1;
  const latest = asks;
  let mine = null;
  // It is drawn anew when something has ended: whoever follows the former drawing gives up.
  const isNow = () => shown() && mine === drawings;
  // Drawn anew; or, where somebody is at something, offered. Returns whether to follow on.
  const again = async (place) => {
    if (inUse()) {
      const button = element("button", { type: "button" }, "A run has ended: show it");
      button.addEventListener("click", () => showView(shown, connection, schema, name));
      place.replaceChildren(button);
    } else await showView(shown, connection, schema, name);
    return false;
  };
  const of = { schema_name: schema, view_name: name };
  const [view, history] = await Promise.all([
    ask("connections", connection, "view", of),
    ask("connections", connection, "runs", { ...of, operation: "refresh", limit: LONGEST_HISTORY }),
  ]);
  if (!shown() || latest !== asks) return;
  drawings += 1;
  mine = drawings;
  const known = view.summary;
  document.title = known.view;
  const charts = element("div", { class: "charts" });
  const database = element("div", {}, section("In the database", element("p", { class: "muted" }, "Reading the catalogs …")));
  const runs = element("div");
  const underWay = element("div", { role: "status" });
  const actions = element("div");
  const auto = element("dd", {}, "…");
  const next = element("dd", {}, "…");
  const graph = element("div", {}, element("p", { class: "muted" }, "Reading the catalogs …"));
  show(
    element("nav", { "aria-label": "Up" }, link([connection], "← All views")),
    element("h1", {}, known.view),
    element("p", {}, element("span", { class: `status ${known.state.replace(" ", "-")}` }, known.state), " ", element("span", { class: "muted" }, known.reason)),
    underWay,
    actions,
    facts([
      ["Last filled", known.last_filled_at ? `${age(known.age)} ago` : "never"],
      ["Usually every", known.usual_interval ? age(known.usual_interval) : ""],
      ["Last run", known.last_run ? link([connection, "runs", known.last_run.id], `${known.last_run.operation}, ${known.last_run.status}`) : ""],
      ["It took", milliseconds(known.last_run?.duration_ms)],
      ["Strategy", view.definition.refresh_strategy],
      ["Rows", number(known.row_count)],
      ["Size", bytes(known.heap_bytes)],
      ["Bloat", known.bloat ? `${known.bloat.toFixed(1)} times` : ""],
      ["Failures in 24 h", number(known.failures_24h)],
      ["Refreshed by", known.last_run?.dag_id ?? ""],
      ["On record since", time(view.definition.created_at)],
    ], [["Next run", next], ["What auto would choose now", auto]]),
    charts,
    section("What it reads, and what reads it", graph),
    section("Runs", runs),
    declared(view, connection, of),
    database,
  );
  actionBar(isNow, connection, view, () => again(underWay)).then(
    (content) => actions.replaceChildren(...content),
    (error) => actions.replaceChildren(element("p", { class: "notice" }, "No actions. ", error.message)));
  followRuns(isNow, connection, known, underWay, again);
  ask("connections", connection, "view", "choice", of).then(
    (found) => auto.replaceChildren(element("strong", {}, found.strategy), `, because ${found.reason}`, found.may_refresh ? "" : ". The role of this connection may not refresh it."),
    (error) => auto.replaceChildren(element("span", { class: "muted" }, error.message)));
  nextRun(known.last_run?.dag_id).then((found) => next.replaceChildren(found), () => next.replaceChildren("not known"));
  ask("connections", connection, "graph", of).then(
    (found) => graph.replaceChildren(drawGraph(connection, found.views, known.view)),
    () => graph.replaceChildren(element("p", { class: "muted" }, "There is no drawing of it: it does not stand, or has too many around it.")));
  drawHistory(charts, history.runs.reverse());
  runTable(connection, [schema, name], RUNS_SHOWN).then((content) => runs.replaceChildren(...content), (error) => runs.replaceChildren(element("p", { class: "notice error" }, error.message)));
  ask("connections", connection, "view", "catalog", of).then(
    (found) => database.replaceChildren(...described(connection, found)),
    (error) => database.replaceChildren(section("In the database", element("p", { class: "notice" }, error.message))));
}
