// A refusal with a code of SPEC.md, section 13; and what this loader does not do.

export class Refused extends Error {
  constructor(code, message, result) {
    super(message);
    this.code = code;
    this.result = result;
  }
}

export class Unsupported extends Error {}

export const refuse = (code, message, result) => {
  throw new Refused(code, message, result);
};
