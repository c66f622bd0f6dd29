// The units in which a length can be asked for: the one place to add another. What a word and a
// character are is said in value_server/contract/units.py, and followed here.
//
// key: of a length_target, and for people; a range has it behind min_ and max_. one: of it.
// tokens: that one takes in plain English. dial: its ends and its step. counter: makes a function
// that is given a text part by part and tells how much it has so far; undefined: no text tells.

export const UNITS = [
  { key: "words", one: "word", tokens: 1.4, dial: { min: 15, max: 600, step: 5 }, counter: words },
  {
    key: "characters",
    one: "character",
    tokens: 0.23,
    dial: { min: 80, max: 4000, step: 20 },
    counter: characters,
  },
  {
    key: "tokens",
    one: "token",
    tokens: 1,
    dial: { min: 20, max: 800, step: 5 },
    counter: () => () => undefined,
  },
];

export const unitOf = (key) => UNITS.find((unit) => unit.key === key);

export const phrase = (amount, unit) => `${amount} ${amount === 1 ? unit.one : unit.key}`;

// About as long a text, to two digits: 150 words are 910 characters.
export function convert(amount, from, to) {
  if (from === to) return amount;
  return Math.ceil(Number(((amount * from.tokens) / to.tokens).toPrecision(2)));
}

// What is expected still behind a text of so much, of what the server told of it: {expected,
// tokens, and expected_words or the like of a target in such a unit}. A tilt has no unit: its
// tokens to come are taken as those so far were. null: not known; undefined: not told.
export function expectedOf(told, unit, amount) {
  const said = unit.key === "tokens" ? told.expected : told[`expected_${unit.key}`];
  return said ?? (told.expected && (told.expected * amount) / told.tokens);
}

// Where a text stands: outside of a word, in one, behind an ideograph, or behind marks with
// which a word began that has no letter yet.
const [OUT, IN, IDEOGRAPH, MARKS] = [0, 1, 2, 3];
// [place][kind] → [words more, place behind it]; kinds: as of kindOf.
const STEPS = [
  [[0, OUT], [1, IDEOGRAPH], [1, IN], [1, MARKS]],
  [[0, OUT], [1, IDEOGRAPH], [0, IN], [0, IN]],
  [[0, OUT], [1, IDEOGRAPH], [1, IN], [0, IDEOGRAPH]],
  [[0, OUT], [0, IDEOGRAPH], [0, IN], [0, MARKS]],
];
// What Python calls white space; JavaScript's own is another.
const SPACE = /[\t-\r\x1c-\x1f\x85\p{Z}]/u;
const IDEOGRAPHS =
  /(?!\p{S})[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Bopomofo}\u30fc\uff70]/u;
const LETTER = /(?!\p{Lm})[\p{L}\p{N}]/u; // Lm: what changes the letter before it

// White space, ideographs and kana, letters and digits, all others.
function kindOf(character) {
  return SPACE.test(character) ? 0
    : IDEOGRAPHS.test(character) ? 1
    : LETTER.test(character) ? 2
    : 3;
}

function words() {
  let [count, place] = [0, OUT];
  return (text) => {
    for (const character of text) {
      const [more, behind] = STEPS[place][kindOf(character)];
      count += more;
      place = behind;
    }
    return count;
  };
}

// Code points, of which some have a length of 2 here.
function characters() {
  let count = 0;
  return (text) => (count += [...text].length);
}
