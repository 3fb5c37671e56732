// In what a view differs from what it was declared to be.

import { ask, diff, element } from "./parts.js";
import { highlighted } from "./sql.js";

// One change: what stands, what is declared, and what would mend it.
function change(step) {
  return element("li", {},
    element("p", {}, element("strong", {}, step.title), `: ${step.why}`),
    step.detail.length ? diff(step.detail) : null,
    step.sql.length
      ? element("details", {}, element("summary", {}, "What would mend it", step.lock === "none" ? "" : ` (locks ${step.lock}: ${step.cost})`),
        element("pre", { class: "sql" }, highlighted(step.sql.map((text) => `${text};`).join("\n"))))
      : null);
}

export function compared(plan) {
  const parts = [];
  if (!plan.steps.length) parts.push(element("p", {}, "It is what it was declared to be."));
  else parts.push(element("p", {}, plan.stands ? `It differs in ${plan.steps.length === 1 ? "one thing" : `${plan.steps.length} things`}.` : "It does not stand. What would make it:"), element("ol", { class: "changes" }, plan.steps.map(change)));
  for (const refusal of plan.refusals) parts.push(element("p", { class: "notice error" }, "This cannot be applied as it is. ", refusal));
  for (const note of plan.notes) parts.push(element("p", { class: "notice" }, note));
  if (plan.left_alone.length) parts.push(element("p", { class: "muted" }, "Left alone, since the definition does not mention it: ", plan.left_alone.join(", "), "."));
  return parts;
}

// When somebody asks for it: the server has to make the definition real for a moment, in a transaction that is undone.
export function comparison(connection, of) {
  const place = element("div", { role: "status" });
  const button = element("button", { type: "button" }, "Compare with the database now");
  button.addEventListener("click", async () => {
    button.disabled = true;
    place.replaceChildren(element("p", { class: "muted" }, "Comparing …"));
    try {
      place.replaceChildren(...compared(await ask("connections", connection, "view", "plan", of)));
    } catch (error) {
      place.replaceChildren(element("p", { class: "notice error" }, error.message));
    }
    button.disabled = false;
  });
  return element("div", {}, element("p", {}, button), place);
}
