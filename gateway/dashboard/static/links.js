// Links between the pages of the public and the admin port, and to further URLs of both.

import { hasKey } from "./api.js";
import { element } from "./format.js";

const LOOPBACK = ["localhost", "127.0.0.1", "[::1]"];

// scheme: of the gateway's own ports; a reverse proxy may use another one.
export function pageLinks(status, scheme, isAdmin) {
  const links = [];
  const [gateway] = status.gateway ?? [];
  if (isAdmin) links.unshift(["public page", reachable(scheme, gateway?.http)]);
  else {
    // a client's key shows only ports, and admin ports only if it opens them
    const address = gateway?.admin_http ?? (gateway?.admin_port && `${location.hostname}:${gateway.admin_port}`);
    if (address) links.unshift(["admin page", reachable(scheme, address)]);
    if (!hasKey()) links.push(["metrics", "metrics"], ["API", "openapi.json"]); // a link sends no key
  }
  return links.filter(([, url]) => url).map(([name, url]) =>
    url.startsWith("!")
      ? element("span", { title: "this address is open to programs on the gateway's host only" }, `${name}: ${url.slice(1)}`)
      : element("a", { href: url }, name),
  );
}

// URL of an address; prefixed with "!" if browsers on other hosts cannot reach it.
function reachable(scheme, address) {
  const host = address?.replace(/:\d+$/, "");
  if (LOOPBACK.includes(host) && !LOOPBACK.includes(location.hostname)) return `!${address}`;
  return address && `${scheme}://${address}/`;
}
