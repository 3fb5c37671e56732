// All views at a glance.

import { age, airflow, ask, bytes, connectionPicker, element, link, milliseconds, moment, number, progress, show, sparkline, time, whileShown } from "./parts.js";

const ORDER = ["failing", "late", "running", "stale", "never run", "fresh", "gone"];
const COLUMNS = [
  ["View", (view) => view.view],
  ["State", (view) => ORDER.indexOf(stateOf(view))],
  ["Last refresh", (view) => -(view.age ?? Infinity)],
  ["Duration", (view) => view.last_run?.duration_ms ?? -1],
  ["Rows", (view) => view.row_count ?? -1],
  ["Size", (view) => view.heap_bytes ?? -1],
  ["Bloat", (view) => view.bloat ?? -1],
  ["Strategy", (view) => view.last_run?.strategy ?? ""],
  ["Next run", (view) => (view.next ? Date.parse(view.next) : Infinity)],
];

const NUMBERS = new Set(["Duration", "Rows", "Size", "Bloat"]);

const stateOf = (view) => (view.state === "fresh" && view.stale?.stale ? "stale" : view.state);
const reasonOf = (view) => {
  if (view.state !== "fresh") return view.reason;
  return view.stale?.reason ?? (view.judged ? `${view.reason}; whether what it reads has changed is not known before its next refresh` : view.reason);
};

function cells(connection, view) {
  const running = view.running.find((run) => !run.lost);
  const usual = view.durations_ms.length ? view.durations_ms.reduce((sum, each) => sum + each, 0) / view.durations_ms.length / 1000 : null;
  const known = running && (view.underWay ?? { seconds: running.seconds, usual_seconds: running.operation === "refresh" ? usual : null });
  const state = stateOf(view);
  return [
    element("td", {}, link([connection, "views", view.schema_name, view.view_name], view.view)),
    element("td", {}, element("span", { class: `status ${state.replace(" ", "-")}`, title: reasonOf(view) }, state),
      known ? [" ", progress(known), known.said ? element("div", { class: "said muted" }, known.said) : null] : null),
    element("td", {}, view.last_filled_at ? element("span", { title: moment(view.last_filled_at) }, `${age(view.age)} ago`) : ""),
    element("td", { class: "number" }, sparkline(view.durations_ms), " ", milliseconds(view.last_run?.duration_ms)),
    element("td", { class: "number" }, number(view.row_count)),
    element("td", { class: "number" }, bytes(view.heap_bytes)),
    element("td", { class: "number" }, view.bloat ? `${view.bloat.toFixed(1)}×` : ""),
    element("td", {}, view.last_run?.strategy ?? ""),
    element("td", {}, view.next ? time(view.next) : view.paused ? element("span", { class: "muted" }, "paused") : ""),
  ];
}

// When the DAGs that refreshed them last run next.
async function addSchedules(views) {
  const ids = [...new Set(views.map((view) => view.last_run?.dag_id).filter(Boolean))];
  await Promise.all(ids.slice(0, 50).map(async (id) => {
    const dag = await airflow(["dags", id]);
    if (!dag) return;
    for (const view of views) {
      if (view.last_run?.dag_id !== id) continue;
      view.paused = dag.is_paused;
      view.next = dag.is_paused ? null : dag.next_dagrun_run_after;
    }
  }));
}

const LOOK_EVERY = 4000;
const READ_EVERY = 30000;

export async function showViews(isNow, connection, others) {
  let { views } = await ask("connections", connection, "views");
  if (!isNow()) return;
  document.title = `Materialized views of ${connection}`;
  const kept = { text: "", state: "", column: 1, down: false };
  const search = element("input", { type: "search", placeholder: "Search", "aria-label": "Search views by name", id: "search" });
  const states = element("select", { "aria-label": "Only views of this state" }, element("option", { value: "" }, "All states"),
    ORDER.map((state) => element("option", { value: state }, state)));
  const rows = new Map();
  const count = element("span", { class: "muted", role: "status" });
  const body = element("tbody");
  const heads = COLUMNS.map(([name], index) => {
    const button = element("button", { type: "button", class: "sort" }, name);
    button.addEventListener("click", () => {
      kept.down = kept.column === index ? !kept.down : false;
      kept.column = index;
      draw();
    });
    return element("th", { scope: "col", class: NUMBERS.has(name) ? "number" : null }, button);
  });

  function draw() {
    const [, value] = COLUMNS[kept.column];
    const chosen = views
      .filter((view) => view.view.toLowerCase().includes(kept.text) && (!kept.state || stateOf(view) === kept.state))
      .sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        const order = typeof a === "string" ? a.localeCompare(b) : a - b;
        return (kept.down ? -order : order) || one.view.localeCompare(other.view);
      });
    heads.forEach((head, index) => {
      if (index === kept.column) head.setAttribute("aria-sort", kept.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    count.textContent = chosen.length === views.length ? `${views.length} ${views.length === 1 ? "view" : "views"}` : `${chosen.length} of ${views.length} views`;
    // Row by row: whoever reads one, or stands on its link, is not disturbed by what becomes of others.
    const focused = document.activeElement?.closest?.("tr");
    const wanted = chosen.map((view) => {
      const said = JSON.stringify(view);
      const drawn = rows.get(view.view);
      if (drawn?.said === said) return drawn.row;
      const row = drawn?.row ?? element("tr");
      row.replaceChildren(...cells(connection, view));
      rows.set(view.view, { said, row });
      if (row === focused) row.querySelector("a").focus({ preventScroll: true });
      return row;
    });
    if (wanted.length !== body.children.length || wanted.some((row, index) => row !== body.children[index])) {
      body.replaceChildren(...wanted);
      if (wanted.includes(focused)) focused.querySelector("a").focus({ preventScroll: true });
    }
  }

  search.addEventListener("input", () => {
    kept.text = search.value.toLowerCase();
    draw();
  });
  states.addEventListener("change", () => {
    kept.state = states.value;
    draw();
  });
  const picker = connectionPicker(others, connection);
  show(
    element("h1", {}, "Materialized views"),
    views.length
      ? [
        element("div", { class: "tools" }, others.length > 1 ? picker : null, search, states, count, link([connection, "runs"], "All runs"), link([connection, "graph"], "Graph")),
        element("div", { class: "scroll" }, element("table", { class: "views" }, element("thead", {}, element("tr", {}, heads)), body)),
      ]
      : [others.length > 1 ? picker : null, element("p", { class: "notice" }, "No view is on record here yet. A view is, from its first run on: create or refresh one with the operators, the hook or the command line.")],
  );
  draw();
  const redraw = () => {
    if (isNow()) draw();
  };

  // What takes longer, or changes while somebody looks.
  function add(to) {
    ask("connections", connection, "staleness").then((found) => {
      const stale = new Map(found.views.map((each) => [each.view, each]));
      for (const view of to) Object.assign(view, { judged: true, stale: stale.get(view.view) });
      redraw();
    }, () => {});
    addSchedules(to).then(redraw, () => {});
  }

  let readAt = Date.now();
  async function look() {
    const running = new Set(views.flatMap((view) => view.running.filter((run) => !run.lost).map((run) => run.id)));
    let changed = Date.now() - readAt > READ_EVERY;
    if (running.size) {
      const { runs } = await ask("connections", connection, "running");
      const seen = new Map(runs.map((run) => [run.run_id, run]));
      for (const view of views) view.underWay = view.running.map((run) => seen.get(run.id)).find(Boolean);
      changed ||= [...running].some((id) => !seen.has(id)) && runs.length < 20;
      changed ||= runs.some((run) => !running.has(run.run_id));
      redraw();
    }
    if (!changed) return;
    const before = new Map(views.map((view) => [view.view, view]));
    const found = await ask("connections", connection, "views");
    if (!isNow()) return;
    readAt = Date.now();
    for (const view of found.views) {
      const { judged, stale, next, paused } = before.get(view.view) ?? {};
      Object.assign(view, { judged, stale, next, paused });
    }
    views = found.views;
    redraw();
    add(views);
  }

  add(views);
  look().catch(() => {});
  whileShown(LOOK_EVERY, isNow, look);
}
