// The units in which a length can be asked for: the one place to add another.
//
// key: of a length_target; a range has it behind min_ and max_. name: for people.
// count: what an answer of {tokens, text} has of it.

export const UNITS = [{ key: "tokens", name: "tokens", count: ({ tokens }) => tokens }];

export const unitOf = (key) => UNITS.find((unit) => unit.key === key) ?? UNITS[0];
