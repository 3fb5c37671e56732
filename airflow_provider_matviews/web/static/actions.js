// What may be done about a view: by triggering a DAG, by Airflow's own API. Nothing is done here.

import { compared } from "./differences.js";
import { airflow, ask, element, encoded, object, Refused, root } from "./parts.js";

const STRATEGIES = ["as declared", "auto", "swap", "concurrent", "regular"];
const POLL = 2000;
const KEPT = 600_000;
const SAYS = {
  refresh: ["Refresh", "Its query runs anew, and the view gets what it gives."],
  verify: ["Verify", "Its query runs beside it, and the two are compared row by row. Nothing is changed. The log of the task tells what differs."],
  apply: ["Apply definition", "The view is made what it was last declared to be."],
};

const runPath = (dagId, runId) => `${root}/dags/${encoded([dagId])}/runs/${encoded([runId])}`;

// What it would do, as far as that can be seen now.
function foreseen(connection, summary) {
  const place = element("div", { role: "status", class: "scroll" }, "Comparing …");
  ask("connections", connection, "view", "plan", { schema_name: summary.schema_name, view_name: summary.view_name }).then(
    (plan) => place.replaceChildren(...compared(plan)),
    (error) => place.replaceChildren(element("p", { class: "notice" }, "What would change cannot be told. ", error.message)));
  return place;
}

function confirmed(action, connection, { summary, definition }, dagId) {
  const [title, meaning] = SAYS[action];
  const strategy = element("select", { id: "strategy" }, STRATEGIES.map((each) => element("option", { value: each }, each)));
  const go = element("button", { type: "button", class: "primary" }, title);
  const back = element("button", { type: "button" }, "Cancel");
  const dialog = element("dialog", { "aria-labelledby": "asked" },
    element("h2", { id: "asked" }, `${title}: ${summary.view}?`),
    element("p", {}, meaning, action !== "apply" ? "" : object(definition.declaration).exclusive
      ? " It is declared to be exclusive: indexes, grants and whatever else its definition does not mention are taken away."
      : " What the definition does not mention is left alone."),
    action === "apply" ? foreseen(connection, summary) : null,
    action === "refresh" ? element("p", {}, element("label", { for: "strategy" }, "Strategy "), strategy) : null,
    element("p", { class: "muted" }, `Triggers the DAG ${dagId}, on the connection ${connection}.`),
    element("p", { class: "tools" }, go, back));
  document.body.append(dialog);
  return new Promise((resolve) => {
    const end = (answer) => {
      removeEventListener("hashchange", leave);
      resolve(answer);
      dialog.remove();
    };
    const leave = () => end(null);
    go.addEventListener("click", () => end({ refresh_strategy: strategy.value }));
    back.addEventListener("click", leave);
    dialog.addEventListener("cancel", leave);
    addEventListener("hashchange", leave);
    dialog.showModal();
    back.focus();
  });
}

// What was triggered for a view, and how it goes: the page is drawn anew, or left and come back to, meanwhile.
const asked = new Map();

// A run of the DAG ends well also where its task left the view alone.
async function outcome(dagId, runId, action, state) {
  if (state !== "success") return state;
  const found = await airflow(["dags", dagId, "dagRuns", runId, "taskInstances"]).catch(() => null);
  return found?.task_instances.find((each) => each.task_id === action)?.state ?? state;
}

async function follow(dagId, runId, action, said) {
  const link = element("a", { href: runPath(dagId, runId), target: "_top" }, "Its run in Airflow");
  while (true) {
    const run = document.hidden ? null : await airflow(["dags", dagId, "dagRuns", runId]).catch(() => null);
    if (run) {
      const ended = run.state === "success" || run.state === "failed";
      const state = await outcome(dagId, runId, action, run.state);
      said.replaceChildren(`${SAYS[action][0]}: `, element("span", { class: `status ${state}` }, state), " ", link);
      if (ended) return;
    }
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
}

// `isLatest` is of this drawing of the page, `again` draws it anew.
export async function actionBar(isLatest, connection, view, again) {
  const { schema_name: schema, view_name: name } = view.summary;
  const { dag_id: dagId, actions } = await ask("connections", connection, "actions");
  if (!dagId || !actions.length) return [];
  const dag = await airflow(["dags", dagId]);
  if (!dag) return [element("p", { class: "muted" }, `No actions: Airflow has no DAG ${dagId}, which its configuration names, or you may not see it.`)];
  if (dag.is_paused) return [element("p", { class: "muted" }, "No actions: ", element("a", { href: `${root}/dags/${encoded([dagId])}`, target: "_top" }, dagId), " is paused, so that what is triggered would not begin.")];
  if (!isLatest()) return [];
  const key = encoded([connection, schema, name]);
  const known = asked.get(key);
  const state = known && !(known.endedAt && Date.now() - known.endedAt > KEPT) ? known : { busy: false, endedAt: null, said: element("span", { role: "status", tabindex: "-1" }) };
  asked.set(key, state);
  state.draw = async () => {
    if (isLatest()) await again();
  };
  const declared = Object.keys(object(view.definition.declaration)).length > 0;
  const may = (action) => {
    if (!SAYS[action]) return false;
    return action === "apply" ? declared && view.definition.managed : view.summary.state !== "gone";
  };

  async function carryOut(action, answer) {
    state.busy = true;
    state.endedAt = null;
    state.buttons.forEach((each) => { each.disabled = true; });
    state.said.replaceChildren("Triggering …");
    state.said.focus();
    try {
      const quoted = [schema, name].map((part) => `"${part.replaceAll('"', '""')}"`).join(".");
      const run = await airflow(["dags", dagId, "dagRuns"], { logical_date: null, conf: { action, connection_id: connection, view: quoted, ...answer } });
      await follow(dagId, run.dag_run_id, action, state.said);
    } catch (error) {
      state.said.replaceChildren(element("span", { class: "error" }, error instanceof Refused ? error.message : `It could not be triggered: ${error}`));
    }
    state.busy = false;
    state.endedAt = Date.now();
    state.buttons.forEach((each) => { each.disabled = false; });
    await state.draw().catch(() => {});
  }

  state.buttons = actions.filter(may).map((action) => {
    const button = element("button", { type: "button", disabled: state.busy }, `${SAYS[action][0]} …`);
    button.addEventListener("click", async () => {
      const answer = await confirmed(action, connection, view, dagId);
      button.focus();
      if (answer) await carryOut(action, answer);
    });
    return button;
  });
  return [element("p", { class: "tools" }, state.buttons, state.said)];
}
