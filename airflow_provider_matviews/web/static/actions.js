// What may be done about a view: by triggering a DAG, by Airflow's own API. Nothing is done here.

import { airflow, ask, element, encoded, object, Refused, root } from "./parts.js";
import { showView } from "./view.js";

const STRATEGIES = ["as declared", "auto", "swap", "concurrent", "regular"];
const POLL = 2000;
const SAYS = {
  refresh: ["Refresh", "Its query runs anew, and the view gets what it gives."],
  verify: ["Verify", "Its query runs beside it, and the two are compared row by row. Nothing is changed. The log of the task tells what differs."],
  apply: ["Apply definition", "The view is made what it was last declared to be; “Compare with the database now” below shows what that changes. What the definition does not mention is left alone."],
};

const runPath = (dagId, runId) => `${root}/dags/${encoded([dagId])}/runs/${encoded([runId])}`;

function confirmed(action, connection, view, dagId) {
  const [title, meaning] = SAYS[action];
  const strategy = element("select", { id: "strategy" }, STRATEGIES.map((each) => element("option", { value: each }, each)));
  const go = element("button", { type: "button", class: "primary" }, title);
  const back = element("button", { type: "button" }, "Cancel");
  const dialog = element("dialog", { "aria-labelledby": "asked" },
    element("h2", { id: "asked" }, `${title}: ${view}?`),
    element("p", {}, meaning),
    action === "refresh" ? element("p", {}, element("label", { for: "strategy" }, "Strategy "), strategy) : null,
    element("p", { class: "muted" }, `Triggers the DAG ${dagId}, on the connection ${connection}.`),
    element("p", { class: "tools" }, go, back));
  document.body.append(dialog);
  return new Promise((resolve) => {
    const end = (answer) => {
      resolve(answer);
      dialog.remove();
    };
    go.addEventListener("click", () => end({ refresh_strategy: strategy.value }));
    back.addEventListener("click", () => end(null));
    dialog.addEventListener("cancel", () => end(null));
    dialog.showModal();
    back.focus();
  });
}

// What was triggered for a view, and how it goes: the page is drawn anew meanwhile.
const asked = new Map();

async function follow(isNow, dagId, runId, said) {
  const link = element("a", { href: runPath(dagId, runId), target: "_top" }, "Its run in Airflow");
  while (isNow()) {
    const run = await airflow(["dags", dagId, "dagRuns", runId]).catch(() => null);
    const state = run?.state ?? "not known";
    said.replaceChildren(element("span", { class: `status ${state}` }, state), " ", link);
    if (state === "success" || state === "failed") return true;
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
  return false;
}

// `isNow` is of the page, `isLatest` of this drawing of it.
export async function actionBar(isNow, isLatest, connection, view) {
  const { schema_name: schema, view_name: name, view: title } = view.summary;
  const { dag_id: dagId, actions } = await ask("connections", connection, "actions");
  if (!dagId || !actions.length) return [];
  const dag = await airflow(["dags", dagId]);
  if (!dag) return [element("p", { class: "muted" }, `No actions: Airflow has no DAG ${dagId}, which its configuration names, or you may not see it.`)];
  if (dag.is_paused) return [element("p", { class: "muted" }, "No actions: ", element("a", { href: `${root}/dags/${encoded([dagId])}`, target: "_top" }, dagId), " is paused, so that what is triggered would not begin.")];
  if (!isLatest()) return [];
  const key = encoded([connection, schema, name]);
  const state = asked.get(key) ?? { busy: false, said: element("span", { role: "status" }) };
  asked.set(key, state);
  const declared = Object.keys(object(view.definition.declaration)).length > 0;

  async function carryOut(action, answer) {
    const said = (...content) => state.said.replaceChildren(...content);
    state.busy = true;
    state.buttons.forEach((each) => { each.disabled = true; });
    said("Triggering …");
    try {
      const quoted = [schema, name].map((part) => `"${part.replaceAll('"', '""')}"`).join(".");
      const run = await airflow(["dags", dagId, "dagRuns"], { logical_date: null, conf: { action, connection_id: connection, view: quoted, ...answer } });
      if (!(await follow(isNow, dagId, run.dag_run_id, state.said))) asked.delete(key);
      state.said.prepend(`${SAYS[action][0]}: `);
    } catch (error) {
      said(element("span", { class: "error" }, error instanceof Refused ? error.message : `It could not be triggered: ${error}`));
    }
    state.busy = false;
    state.buttons.forEach((each) => { each.disabled = false; });
    if (isNow()) await showView(isNow, connection, schema, name).catch(() => {});
  }

  state.buttons = actions.filter((action) => SAYS[action] && (action !== "apply" || (declared && view.definition.managed))).map((action) => {
    const button = element("button", { type: "button", disabled: state.busy }, `${SAYS[action][0]} …`);
    button.addEventListener("click", async () => {
      const answer = await confirmed(action, connection, title, dagId);
      button.focus();
      if (answer) await carryOut(action, answer);
    });
    return button;
  });
  return [element("p", { class: "tools" }, state.buttons, state.said)];
}
