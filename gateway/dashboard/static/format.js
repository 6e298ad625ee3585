// Small helpers for text and elements.

export function count(value) {
  return Number(value).toLocaleString("en", { maximumFractionDigits: 0 });
}

// As few characters as an axis has room for: 0.5, 250, 1.5K, 20M.
export function short(value) {
  return value.toLocaleString("en", { notation: "compact" });
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)}%`;
}

export function clock(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString("en-GB");
}

// An element with properties and children; texts become text nodes, never markup.
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key === "className" ? "class" : key, value);
  }
  made.append(...children);
  return made;
}

// Replaces the children only where the text has changed, so that a reader is not disturbed.
export function fill(parent, children) {
  const draft = document.createElement("div");
  draft.append(...children);
  if (draft.innerHTML !== parent.innerHTML) parent.replaceChildren(...draft.childNodes);
}

export function byId(id) {
  return document.getElementById(id);
}

// Seconds as days, hours and minutes: two units.
export function duration(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// A button that cannot work is disabled, with the reason (empty: it works) in its title and beside it.
export function allow(button, reason) {
  button.disabled = Boolean(reason);
  button.title = reason;
  const text = byId(button.getAttribute("aria-describedby"));
  if (text && text.textContent !== reason) text.textContent = reason;
}
