// Which views read which, drawn from left to right.

import { ask, drawn, element, encoded, link, show, visible } from "./parts.js";

const [WIDTH, HEIGHT, GAP, COLUMN] = [190, 26, 10, 260];
const LONGEST_LABEL = 23;

const short = (text) => (text.length > LONGEST_LABEL ? `${text.slice(0, LONGEST_LABEL - 1)}…` : text);

export function drawGraph(connection, views, current = null) {
  const tables = [...new Set(views.flatMap((view) => view.reads_tables))].sort();
  const columns = [tables.map((name) => ({ name })), ...Array.from({ length: 1 + Math.max(-1, ...views.map((view) => view.level)) }, () => [])];
  for (const view of views) columns[view.level + 1].push({ name: view.view, view });
  const places = new Map();
  columns.forEach((nodes, column) => nodes.forEach((node, row) => places.set(node.name, [column * COLUMN + 1, row * (HEIGHT + GAP) + 1])));
  const width = columns.length * COLUMN - (COLUMN - WIDTH) + 2;
  const height = Math.max(...columns.map((nodes) => nodes.length), 1) * (HEIGHT + GAP);
  const edges = views.flatMap((view) => [
    ...[...view.reads_views, ...view.reads_tables].map((needed) => [needed, view.view, "edge"]),
    ...view.in_a_circle.map((needed) => [needed, view.view, "edge circle"]),
  ]);
  const lines = edges.filter(([from]) => places.has(from)).map(([from, to, kind]) => {
    const [[x1, y1], [x2, y2]] = [places.get(from), places.get(to)];
    const [begin, end] = [[x1 + WIDTH, y1 + HEIGHT / 2], [x2, y2 + HEIGHT / 2]];
    const bend = Math.max(30, (end[0] - begin[0]) / 2);
    return drawn("path", { class: kind, d: `M${begin} C${begin[0] + bend},${begin[1]} ${end[0] - bend},${end[1]} ${end}` });
  });
  const boxes = columns.flat().map(({ name, view }) => {
    const [x, y] = places.get(name);
    const title = drawn("title", {});
    title.append(visible(name));
    const text = drawn("text", { x: x + 8, y: y + HEIGHT / 2, "dominant-baseline": "central" });
    text.append(visible(short(name)));
    const box = [drawn("rect", { x, y, width: WIDTH, height: HEIGHT, rx: 4 }), text, title];
    if (!view) return drawn("g", { class: "table" }, ...box);
    return drawn("a", { class: name === current ? "view current" : "view", href: `#/${encoded([connection, "views", view.schema_name, view.view_name])}` }, ...box);
  });
  const description = views.map((view) => `${view.view} reads ${[...view.reads_views, ...view.reads_tables].join(", ") || "nothing"}`).join("; ");
  return element("div", { class: "scroll graph", tabindex: "0", role: "group", "aria-label": `Graph: ${description}.` },
    drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, ...lines, ...boxes));
}

export async function showGraph(isNow, connection) {
  const { views } = await ask("connections", connection, "graph");
  if (!isNow()) return;
  document.title = `Graph of ${connection}`;
  show(
    element("nav", { "aria-label": "Up" }, link([connection], "← All views")),
    element("h1", {}, "Which view reads which"),
    views.length ? drawGraph(connection, views) : element("p", { class: "notice" }, "No materialized view stands in this database."),
  );
}
