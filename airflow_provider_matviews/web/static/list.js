// All views at a glance.

import { age, ask, bytes, connectionPicker, element, link, milliseconds, number, root, show, sparkline, time } from "./parts.js";

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

const stateOf = (view) => (view.state === "fresh" && view.stale?.stale ? "stale" : view.state);
const reasonOf = (view) => (view.state === "fresh" && view.stale ? view.stale.reason : view.reason);

function cells(connection, view) {
  const running = view.running.find((run) => !run.lost);
  const usual = view.durations_ms.length ? view.durations_ms.reduce((sum, each) => sum + each, 0) / view.durations_ms.length : 0;
  const progress = running && usual ? element("progress", { max: usual, value: Math.min(running.seconds * 1000, usual), "aria-label": "compared with its average duration" }) : null;
  const state = stateOf(view);
  return [
    element("td", {}, link([connection, "views", view.schema_name, view.view_name], view.view)),
    element("td", {}, element("span", { class: `status ${state.replace(" ", "-")}`, title: reasonOf(view) }, state), progress,
      running ? element("span", { class: "muted" }, ` for ${age(running.seconds)}`) : null),
    element("td", {}, view.last_filled_at ? element("span", { title: new Date(view.last_filled_at).toLocaleString() }, `${age(view.age)} ago`) : ""),
    element("td", { class: "number" }, sparkline(view.durations_ms), " ", milliseconds(view.last_run?.duration_ms)),
    element("td", { class: "number" }, number(view.row_count)),
    element("td", { class: "number" }, bytes(view.heap_bytes)),
    element("td", { class: "number" }, view.bloat ? `${view.bloat.toFixed(1)}×` : ""),
    element("td", {}, view.last_run?.strategy ?? ""),
    element("td", {}, view.next ? time(view.next) : view.paused ? element("span", { class: "muted" }, "paused") : ""),
  ];
}

// From Airflow itself, with the rights of whoever looks.
async function addSchedules(views) {
  const ids = [...new Set(views.map((view) => view.last_run?.dag_id).filter(Boolean))];
  await Promise.all(ids.slice(0, 50).map(async (id) => {
    const answer = await fetch(`${root}/api/v2/dags/${encodeURIComponent(id)}`, { credentials: "same-origin" });
    if (!answer.ok) return;
    const dag = await answer.json();
    for (const view of views) {
      if (view.last_run?.dag_id !== id) continue;
      view.paused = dag.is_paused;
      view.next = dag.is_paused ? null : dag.next_dagrun_run_after;
    }
  }));
}

export async function showViews(connection, others) {
  const { views } = await ask("connections", connection, "views");
  document.title = `Materialized views of ${connection}`;
  const kept = { text: "", state: "", column: 1, down: false };
  const search = element("input", { type: "search", placeholder: "Search", "aria-label": "Search views by name", id: "search" });
  const states = element("select", { "aria-label": "Only views of this state" }, element("option", { value: "" }, "All states"),
    ORDER.map((state) => element("option", { value: state }, state)));
  const count = element("span", { class: "muted", role: "status" });
  const body = element("tbody");
  const heads = COLUMNS.map(([name], index) => {
    const button = element("button", { type: "button", class: "sort" }, name);
    button.addEventListener("click", () => {
      kept.down = kept.column === index ? !kept.down : false;
      kept.column = index;
      draw();
    });
    return element("th", { scope: "col" }, button);
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
    count.textContent = chosen.length === views.length ? `${views.length} views` : `${chosen.length} of ${views.length} views`;
    body.replaceChildren(...chosen.map((view) => element("tr", {}, cells(connection, view))));
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
  const address = location.hash;
  const redraw = () => {
    if (location.hash === address) draw();
  };
  ask("connections", connection, "staleness").then((found) => {
    const stale = new Map(found.views.map((each) => [each.view, each]));
    for (const view of views) view.stale = stale.get(view.view);
    redraw();
  }, () => {});
  addSchedules(views).then(redraw, () => {});
}
