// Light or dark, as Airflow around it is: a page in a frame does not inherit that.

export function followTheme() {
  let host = null;
  try {
    host = window.parent === window ? null : window.parent.document.documentElement;
  } catch {
    host = null;
  }
  const dark = () => {
    if (host) return host.classList.contains("dark") || host.dataset.theme === "dark";
    const stored = localStorage.getItem("theme");
    if (stored === "dark" || stored === "light") return stored === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const apply = () => {
    document.documentElement.dataset.theme = dark() ? "dark" : "light";
  };
  apply();
  if (host) new MutationObserver(apply).observe(host, { attributes: true, attributeFilter: ["class", "data-theme"] });
  addEventListener("storage", apply);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
}
