// Runs: a list of them, and one with everything that is recorded of it.

import { age, array, ask, element, encoded, facts, link, milliseconds, number, object, progress, root, section, show, table, time, whileShown } from "./parts.js";

const PAGE_SIZE = 50;
const HEADS = ["Run", "Operation", "Status", "Started", "Duration", "Strategy", "Rows", "Error"];

function row(connection, run, withView) {
  return element("tr", {},
    element("td", {}, link([connection, "runs", run.id], run.id)),
    withView ? element("td", {}, run.view) : null,
    element("td", {}, run.operation ?? "unknown"),
    element("td", {}, element("span", { class: `status ${run.status}` }, run.status ?? "unknown")),
    element("td", {}, time(run.started_at)),
    element("td", { class: "number" }, milliseconds(run.duration_ms)),
    element("td", {}, run.strategy ?? ""),
    element("td", { class: "number" }, number(run.row_count_after)),
    element("td", { class: "error" }, run.error ?? ""));
}

export async function runTable(connection, view = null, pageSize = PAGE_SIZE) {
  const kept = { operation: "", status: "" };
  const body = element("tbody");
  const more = element("button", { type: "button" }, "Older runs");
  const heads = view ? HEADS : [HEADS[0], "View", ...HEADS.slice(1)];
  const nothing = element("p", { class: "muted", hidden: true }, "There is no such run.");
  let next = null;
  let asked = 0;

  async function read(anew) {
    asked += 1;
    const mine = asked;
    const of = view ? { schema_name: view[0], view_name: view[1] } : {};
    const found = await ask("connections", connection, "runs", { ...of, ...kept, limit: pageSize, before: anew ? null : next });
    if (mine !== asked) return;
    const rows = found.runs.map((run) => row(connection, run, !view));
    if (anew) body.replaceChildren(...rows);
    else body.append(...rows);
    next = found.next;
    more.hidden = !next;
    nothing.hidden = body.children.length > 0;
  }

  const filter = (name, options) => {
    const made = element("select", { "aria-label": `Only runs of this ${name}` }, element("option", { value: "" }, `Every ${name}`),
      options.map((option) => element("option", { value: option }, option)));
    made.addEventListener("change", () => {
      kept[name] = made.value;
      read(true);
    });
    return made;
  };
  more.addEventListener("click", () => read(false));
  await read(true);
  return [
    element("div", { class: "tools" }, filter("status", ["success", "failed", "running", "skipped"]), filter("operation", ["refresh", "create", "drop"])),
    element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, heads.map((head) => element("th", { scope: "col" }, head)))), body)),
    nothing,
    more,
  ];
}

export async function showRuns(isNow, connection) {
  const content = await runTable(connection);
  if (!isNow()) return;
  document.title = `Runs of ${connection}`;
  show(element("nav", { "aria-label": "Up" }, link([connection], "← All views")), element("h1", {}, "Runs"), content);
}

function steps(response) {
  const all = array(response.steps).map(object);
  if (!all.length) return null;
  const statements = array(response.sql);
  const longest = Math.max(...all.map((step) => step.ms ?? 0), 1);
  return section("Steps", table(["Step", "Time", "Statement"], all.map((step, index) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${Math.max(1, (100 * (step.ms ?? 0)) / longest)}%`;
    return element("tr", {},
      element("td", {}, step.step ?? ""),
      element("td", { class: "number" }, milliseconds(step.ms)),
      element("td", {}, bar, element("code", {}, statements[index] ?? "")));
  })));
}

function failure(error) {
  if (error === null || error === undefined) return null;
  if (object(error) !== error) return section("Error", element("pre", {}, typeof error === "string" ? error : JSON.stringify(error, null, 2)));
  return section("Error",
    element("p", {}, element("strong", {}, error.class ?? ""), error.sqlstate ? ` (${error.sqlstate})` : ""),
    element("pre", {}, error.message ?? ""),
    error.hint ? element("p", {}, element("strong", {}, "What to do: "), error.hint) : null,
    array(error.backtrace).length ? element("details", {}, element("summary", {}, "Backtrace"), element("pre", {}, error.backtrace.join("\n"))) : null);
}

function taskLog(meta) {
  if (!meta.dag_id || !meta.run_id || !meta.task_id) return null;
  const mapped = Number.isInteger(meta.map_index) && meta.map_index >= 0 ? `/mapped/${meta.map_index}` : "";
  const query = meta.try_number ? `?try_number=${encodeURIComponent(meta.try_number)}` : "";
  const path = `${root}/dags/${encoded([meta.dag_id])}/runs/${encoded([meta.run_id])}/tasks/${encoded([meta.task_id])}${mapped}${query}`;
  return element("a", { href: path, target: "_top" }, "Task log");
}

function followRun(isNow, connection, run, place) {
  const look = async () => {
    const { runs } = await ask("connections", connection, "running");
    const found = runs.find((each) => each.run_id === run.id);
    if (!isNow()) return false;
    if (found) {
      place.replaceChildren(progress(found), " ", found.said ?? "");
      return true;
    }
    const now = await ask("connections", connection, "runs", run.id);
    if (now.status === "running" && !now.lost) return true;
    if (isNow()) await showRun(isNow, connection, run.id);
    return false;
  };
  look().then((goOn) => goOn && whileShown(3000, isNow, look), () => whileShown(3000, isNow, look));
}

export async function showRun(isNow, connection, id) {
  const run = await ask("connections", connection, "runs", id);
  if (!isNow()) return;
  const meta = object(run.meta);
  const response = object(meta.response);
  const known = new Set(["status", "view", "sql", "steps", "strategy", "reason", "row_count_before", "row_count_after"]);
  const rest = Object.fromEntries(Object.entries(response).filter(([name]) => !known.has(name)));
  document.title = `Run ${run.id} of ${run.view}`;
  const underWay = element("p", { role: "status" });
  if (run.lost) underWay.append("The process of it is gone: nothing runs any more. The next operation on the view, or airflow matviews reap, marks it as failed.");
  else if (run.status === "running") followRun(isNow, connection, run, underWay);
  show(
    element("nav", { "aria-label": "Runs" },
      link([connection, "views", run.schema_name, run.view_name], `↑ ${run.view}`),
      run.previous_id ? link([connection, "runs", run.previous_id], `← Run ${run.previous_id}`) : null,
      run.next_id ? link([connection, "runs", run.next_id], `Run ${run.next_id} →`) : null,
      taskLog(meta)),
    element("h1", {}, `Run ${run.id}: ${run.operation ?? "unknown operation"} of ${run.view}`),
    element("p", {}, element("span", { class: `status ${run.status}` }, run.status ?? "unknown"), " ",
      response.reason && !meta.strategy ? element("span", { class: "muted" }, response.reason) : null),
    underWay,
    facts([
      ["Started", time(run.started_at)],
      ["Finished", time(run.finished_at)],
      ["Duration", milliseconds(run.duration_ms)],
      ["Waited for locks", response.waited_ms ? milliseconds(response.waited_ms) : ""],
      ["Strategy", meta.strategy ? [element("strong", {}, meta.strategy), response.reason ? `, because ${response.reason}` : ""] : ""],
      ["Rows before", number(meta.row_count_before)],
      ["Rows after", number(meta.row_count_after)],
      ["Connection", connection],
      ["DAG", meta.dag_id],
      ["Task", meta.task_id],
      ["DAG run", meta.run_id],
      ["Try", meta.try_number],
      ["Process", meta.process],
    ]),
    failure(run.error),
    steps(response),
    section("What was asked", element("pre", {}, JSON.stringify(meta.request ?? {}, null, 2))),
    section("What else was found", element("pre", {}, JSON.stringify(rest, null, 2))),
    meta === run.meta ? null : section("What is recorded of it", element("pre", {}, JSON.stringify(run.meta, null, 2))),
  );
}
