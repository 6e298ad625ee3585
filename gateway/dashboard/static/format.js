// Small helpers for text and elements.

export function count(value) {
  return Number(value).toLocaleString("en", { maximumFractionDigits: 0 });
}

// Short text of a number for an axis: 0.5, 250, 1.5K, 20M.
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

// Replaces the children only if the text has changed, so that screen readers stay silent.
export function fill(parent, children) {
  const draft = document.createElement("div");
  draft.append(...children);
  if (draft.innerHTML !== parent.innerHTML) parent.replaceChildren(...draft.childNodes);
}

export function byId(id) {
  return document.getElementById(id);
}

// Seconds as text with two units, such as days and hours.
export function duration(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map((unit) => Math.floor(seconds / unit));
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

// Enables a button if reason is empty; otherwise disables it and shows the reason.
export function allow(button, reason) {
  button.disabled = Boolean(reason);
  button.title = reason;
  const text = byId(button.getAttribute("aria-describedby"));
  if (text && text.textContent !== reason) text.textContent = reason;
}
