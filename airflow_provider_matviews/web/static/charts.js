// How refreshes went over time: how long they took, by strategy, and what came of them.

import { bytes, element, milliseconds, number, section, timeZone } from "./parts.js";
import uPlot from "./vendor/uPlot.esm.js";

const HEIGHT = 220;
const WINDOW = 20;
const ALERT_RATIO = 2;
const STRATEGIES = { regular: "--series-1", concurrent: "--series-2", swap: "--series-3" };

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function averages(values) {
  const seen = [];
  return values.map((value) => {
    const average = seen.length ? seen.reduce((sum, each) => sum + each, 0) / seen.length : null;
    if (value !== null) {
      seen.push(value);
      if (seen.length > WINDOW) seen.shift();
    }
    return average;
  });
}

function axes(...formats) {
  const common = { stroke: () => colour("--muted"), grid: { stroke: () => colour("--border"), width: 1 }, ticks: { stroke: () => colour("--border"), width: 1 } };
  return [common, ...formats.map((format, index) => ({ ...common, scale: `y${index}`, side: index ? 1 : 3, size: 70, grid: { ...common.grid, show: !index }, values: (_, ticks) => ticks.map(format) }))];
}

function chart(title, description, series, data, ...formats) {
  const place = element("div", { class: "chart", role: "img", "aria-label": description });
  const options = {
    width: 600, height: HEIGHT, tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), timeZone), axes: axes(...formats), series: [{ label: "Begun" }, ...series],
    scales: Object.fromEntries(formats.map((_, index) => [`y${index}`, { range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.05] }])),
    legend: { live: true }, cursor: { drag: { x: true, y: false } },
  };
  return [section(title, place), () => {
    const made = new uPlot(options, data, place);
    const fit = () => made.setSize({ width: Math.max(280, place.clientWidth), height: HEIGHT });
    fit();
    new ResizeObserver(fit).observe(place);
    new MutationObserver(() => made.redraw(false)).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  }];
}

export function drawHistory(place, runs) {
  const ended = runs.filter((run) => run.status === "success" || run.status === "failed");
  const good = ended.filter((run) => run.status === "success");
  if (ended.length < 2) {
    place.replaceChildren(element("p", { class: "muted" }, "From the second refresh on there is a chart here."));
    return;
  }
  const times = ended.map((run) => Date.parse(run.created_at) / 1000);
  const took = ended.map((run) => (run.status === "success" ? run.duration_ms : null));
  const average = averages(took);
  const strategies = [...new Set(good.map((run) => run.strategy ?? "unknown"))].sort();
  const points = { show: true, size: 6 };
  const format = (_, value) => (value === null || value === undefined ? "–" : milliseconds(value));
  const [durations, drawDurations] = chart(
    "Duration",
    `How long the last ${ended.length} refreshes took; ${ended.length - good.length} of them failed.`,
    [
      ...strategies.map((strategy) => ({ label: strategy, scale: "y0", stroke: () => colour(STRATEGIES[strategy] ?? "--muted"), paths: () => null, points: { ...points, fill: () => colour(STRATEGIES[strategy] ?? "--muted") }, value: format })),
      { label: "failed", scale: "y0", stroke: () => colour("--failed"), paths: () => null, points: { ...points, size: 9, fill: () => colour("--failed") }, value: format },
      { label: `average of ${WINDOW}`, scale: "y0", stroke: () => colour("--muted"), points: { show: false }, value: format },
      { label: `alert (${ALERT_RATIO}×)`, scale: "y0", stroke: () => colour("--failed"), dash: [6, 4], points: { show: false }, value: format },
    ],
    [
      times,
      ...strategies.map((strategy) => ended.map((run) => (run.status === "success" && (run.strategy ?? "unknown") === strategy ? run.duration_ms : null))),
      ended.map((run) => (run.status === "failed" ? run.duration_ms : null)),
      average,
      average.map((value) => (value === null ? null : value * ALERT_RATIO)),
    ],
    milliseconds,
  );
  const measured = [
    ["rows", "--series-2", number, (run) => run.row_count_after],
    ["size", "--series-3", bytes, (run) => run.size_bytes],
  ].filter(([, , , value]) => good.some((run) => value(run) !== null));
  const sized = good.filter((run) => measured.some(([, , , value]) => value(run) !== null));
  const drawings = [drawDurations];
  const sections = [durations];
  if (sized.length > 1) {
    const [sizes, drawSizes] = chart(
      "Rows and size",
      `${measured.map(([name]) => name).join(" and ")} after the last ${sized.length} refreshes.`,
      measured.map(([label, name, format], index) => ({ label, scale: `y${index}`, stroke: () => colour(name), points: { show: sized.length < 100 }, value: (_, value) => format(value) })),
      [sized.map((run) => Date.parse(run.created_at) / 1000), ...measured.map(([, , , value]) => sized.map(value))],
      ...measured.map(([, , format]) => format),
    );
    sections.push(sizes);
    drawings.push(drawSizes);
  }
  place.replaceChildren(...sections);
  for (const draw of drawings) draw();
}
