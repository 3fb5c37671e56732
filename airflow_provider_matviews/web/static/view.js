// One view: how its refreshes went, what it should be and what it is.

import { drawHistory } from "./charts.js";
import { drawGraph } from "./graph.js";
import { age, ask, bytes, element, facts, link, milliseconds, number, object, section, show, table, time } from "./parts.js";
import { runTable } from "./runs.js";
import { highlighted } from "./sql.js";

const LONGEST_HISTORY = 500;

function list(items) {
  return items.length ? element("ul", {}, items.map((item) => element("li", {}, element("code", {}, item)))) : element("p", { class: "muted" }, "None.");
}

function declared(definition, drift, runId, connection) {
  const parts = [];
  if (definition.sql) parts.push(element("pre", { class: "sql" }, highlighted(definition.sql)));
  const declaration = Object.fromEntries(Object.entries(object(definition.declaration)).filter(([name, value]) => name !== "sql" && name !== "name"
    && value !== null && !(typeof value === "object" && Object.keys(value).length === 0)));
  if (Object.keys(declaration).length) parts.push(element("details", {}, element("summary", {}, "What else is declared"), element("pre", {}, JSON.stringify(declaration, null, 2))));
  if (!definition.managed) parts.push(element("p", { class: "muted" }, "It was never declared to this provider, or as managed by somebody else: it is refreshed, and never altered."));
  if (drift?.length) {
    parts.push(element("p", {}, element("strong", {}, "Differs from the database"), ", as ", link([connection, "runs", runId], `run ${runId}`), " found:"),
      element("pre", { class: "diff" }, drift.join("\n")));
  } else if (drift) {
    parts.push(element("p", { class: "muted" }, "Nothing differed from the database when ", link([connection, "runs", runId], `run ${runId}`), " last looked."));
  }
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
      element("h3", {}, "Has"), list(found.attachments.map((each) => each.description))),
  ];
}

export async function showView(connection, schema, name) {
  const of = { schema_name: schema, view_name: name };
  const [view, history] = await Promise.all([
    ask("connections", connection, "view", of),
    ask("connections", connection, "runs", { ...of, operation: "refresh", limit: LONGEST_HISTORY }),
  ]);
  const known = view.summary;
  document.title = known.view;
  const charts = element("div", { class: "charts" });
  const database = element("div", {}, section("In the database", element("p", { class: "muted" }, "Reading the catalogs …")));
  const runs = element("div");
  const graph = element("div", {}, element("p", { class: "muted" }, "Reading the catalogs …"));
  show(
    element("nav", { "aria-label": "Up" }, link([connection], "← All views")),
    element("h1", {}, known.view),
    element("p", {}, element("span", { class: `status ${known.state.replace(" ", "-")}` }, known.state), " ", element("span", { class: "muted" }, known.reason)),
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
      ["Under way", !known.running.length ? "" : known.running.map((run) => link([connection, "runs", run.id], `${run.operation} for ${age(run.seconds)} `))],
      ["On record since", time(view.definition.created_at)],
    ]),
    charts,
    section("What it reads, and what reads it", graph),
    section("Runs", runs),
    declared(view.definition, view.drift, view.drift_run_id, connection),
    database,
  );
  ask("connections", connection, "graph", of).then(
    (found) => graph.replaceChildren(drawGraph(connection, found.views, known.view)),
    () => graph.replaceChildren(element("p", { class: "muted" }, "There is no drawing of it: it does not stand, or has too many around it.")));
  drawHistory(charts, history.runs.reverse());
  runTable(connection, [schema, name]).then((content) => runs.replaceChildren(...content), (error) => runs.replaceChildren(element("p", { class: "notice error" }, error.message)));
  ask("connections", connection, "view", "catalog", of).then(
    (found) => database.replaceChildren(...described(connection, found)),
    (error) => database.replaceChildren(section("In the database", element("p", { class: "notice" }, error.message))));
}
