// The page: asks the API, and shows what it says. Text is only ever set as text.

const page = document.getElementById("page");
const root = location.pathname.replace(/\/matviews\/.*$/, "");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const show = (...children) => page.replaceChildren(...children.flat().filter(Boolean));
const encoded = (parts) => parts.map(encodeURIComponent).join("/");
const link = (parts, text, attributes = {}) => element("a", { href: `#/${encoded(parts)}`, ...attributes }, text);

function followTheme() {
  let host = null;
  try {
    host = window.parent === window ? null : window.parent.document.documentElement;
  } catch {
    host = null;
  }
  const chosen = () => {
    if (host) return host.classList.contains("dark") || host.dataset.theme === "dark";
    const stored = localStorage.getItem("theme");
    if (stored === "dark" || stored === "light") return stored === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const apply = () => {
    document.documentElement.dataset.theme = chosen() ? "dark" : "light";
  };
  apply();
  if (host) new MutationObserver(apply).observe(host, { attributes: true, attributeFilter: ["class", "data-theme"] });
  addEventListener("storage", apply);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
}

class Refused extends Error {}

async function ask(...parts) {
  const answer = await fetch(`api/v1/${encoded(parts)}`, { credentials: "same-origin", headers: { Accept: "application/json" } });
  if (answer.ok) return answer.json();
  if (answer.status === 401) throw new Refused("You are not logged in, or no longer. Log in to Airflow, and load this page again.");
  if (answer.status === 403) throw new Refused("You may not read this connection. Who administers this Airflow can grant it.");
  const said = await answer.json().catch(() => ({}));
  throw new Refused(typeof said.detail === "string" ? said.detail : `The server answered ${answer.status}.`);
}

const number = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en"));

function milliseconds(value) {
  if (value === null || value === undefined) return "";
  if (value < 1000) return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  const seconds = value / 1000;
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function time(value) {
  if (!value) return "";
  const moment = new Date(value);
  return element("time", { datetime: value, title: value }, moment.toLocaleString());
}

function facts(pairs) {
  return element("dl", { class: "facts" }, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined)
    .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function section(title, ...content) {
  return element("section", {}, element("h2", {}, title), ...content);
}

function steps(run) {
  const all = run.meta.response?.steps ?? [];
  if (!all.length) return null;
  const statements = run.meta.response?.sql ?? [];
  const longest = Math.max(...all.map((step) => step.ms ?? 0), 1);
  const rows = all.map((step, index) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${Math.max(1, (100 * (step.ms ?? 0)) / longest)}%`;
    return element("tr", {},
      element("td", {}, step.step ?? ""),
      element("td", { class: "number" }, milliseconds(step.ms)),
      element("td", {}, bar, element("code", {}, statements[index] ?? "")));
  });
  return section("Steps", element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Step"), element("th", { scope: "col", class: "number" }, "Time"), element("th", { scope: "col" }, "Statement"))),
    element("tbody", {}, rows))));
}

function failure(error) {
  if (!error) return null;
  return section("Error",
    element("p", {}, element("strong", {}, error.class ?? ""), error.sqlstate ? ` (${error.sqlstate})` : ""),
    element("pre", {}, error.message ?? ""),
    error.hint ? element("p", {}, element("strong", {}, "What to do: "), error.hint) : null,
    error.backtrace?.length
      ? element("details", {}, element("summary", {}, "Backtrace"), element("pre", {}, error.backtrace.join("\n")))
      : null);
}

function taskLog(meta) {
  if (!meta.dag_id || !meta.run_id || !meta.task_id) return null;
  const mapped = Number.isInteger(meta.map_index) && meta.map_index >= 0 ? `/mapped/${meta.map_index}` : "";
  const query = meta.try_number ? `?try_number=${encodeURIComponent(meta.try_number)}` : "";
  const path = `${root}/dags/${encoded([meta.dag_id])}/runs/${encoded([meta.run_id])}/tasks/${encoded([meta.task_id])}${mapped}${query}`;
  return element("a", { href: path, target: "_top" }, "Task log");
}

async function showRun(connection, id) {
  const run = await ask("connections", connection, "runs", id);
  const { meta } = run;
  const response = meta.response ?? {};
  const known = new Set(["status", "view", "sql", "steps", "strategy", "reason", "row_count_before", "row_count_after"]);
  document.title = `Run ${run.id} of ${run.view}`;
  show(
    element("nav", { "aria-label": "Runs" },
      run.previous_id ? link([connection, "runs", run.previous_id], `← Run ${run.previous_id}`) : null,
      run.next_id ? link([connection, "runs", run.next_id], `Run ${run.next_id} →`) : null,
      taskLog(meta)),
    element("h1", {}, `Run ${run.id}: ${run.operation} of ${run.view}`),
    element("p", {}, element("span", { class: `status ${run.status}` }, run.status), " ",
      response.reason ? element("span", { class: "muted" }, response.reason) : null),
    facts([
      ["Started", time(run.started_at)],
      ["Finished", time(run.finished_at)],
      ["Duration", milliseconds(run.duration_ms)],
      ["Waited for locks", response.waited_ms ? milliseconds(response.waited_ms) : ""],
      ["Strategy", meta.strategy],
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
    steps(run),
    section("What was asked", element("pre", {}, JSON.stringify(meta.request ?? {}, null, 2))),
    section("What else was found", element("pre", {},
      JSON.stringify(Object.fromEntries(Object.entries(response).filter(([name]) => !known.has(name))), null, 2))),
  );
}

async function showConnections() {
  const { connections } = await ask("connections");
  document.title = "Materialized views";
  show(
    element("h1", {}, "Materialized views"),
    connections.length
      ? element("ul", {}, connections.map((connection) => element("li", {}, connection)))
      : element("p", { class: "notice" }, "There is no connection that is shown here and that you may read. ",
        "The option connections in the section [matviews] of Airflow's configuration names those that are shown."));
}

const routes = [
  [/^#\/([^/]+)\/runs\/(\d+)$/, showRun],
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
