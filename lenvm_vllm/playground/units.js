// The units in which a length can be asked for: the one place to add another.
//
// key: of a length_target; a range has it behind min_ and max_. name: for people.
// count: what a finished answer has of it.

export const UNITS = [{ key: "tokens", name: "tokens", count: (answer) => answer.tokens }];

export const unitOf = (key) => UNITS.find((unit) => unit.key === key) ?? UNITS[0];
