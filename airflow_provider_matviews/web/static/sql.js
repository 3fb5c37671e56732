// SQL, coloured by what its words are: a reading aid, no parser.

import { element } from "./parts.js";

const WORDS = new Set(("all and any array as asc between by case cast coalesce collate cross cube current_date current_timestamp current_user date desc distinct else end except exists extract false "
  + "fetch filter first following for from full group grouping having in inner intersect interval is join last lateral left like limit materialized natural not null nulls offset on or order outer over "
  + "partition preceding range recursive right rollup row rows select sets similar some table tablesample then time timestamp to true unbounded union unnest using values view when where window with within without zone").split(" "));
const TOKEN = /(--[^\n]*|\/\*[\s\S]*?\*\/)|('(?:[^']|'')*'|\$([A-Za-z_]\w*)?\$[\s\S]*?\$\3\$)|("(?:[^"]|"")*")|(\b\d+(?:\.\d+)?\b)|([A-Za-z_]\w*)/g;

export function highlighted(text) {
  const parts = [];
  let position = 0;
  for (const found of text.matchAll(TOKEN)) {
    const [whole, comment, string, , quoted, digits, word] = found;
    const kind = comment ? "comment" : string ? "string" : quoted ? "" : digits ? "digits" : WORDS.has(word.toLowerCase()) ? "word" : "";
    if (!kind) continue;
    parts.push(text.slice(position, found.index), element("span", { class: kind }, whole));
    position = found.index + whole.length;
  }
  parts.push(text.slice(position));
  return element("code", {}, parts);
}
