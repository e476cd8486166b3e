//! Writes one JSON object per line; nothing more than the guest's reports need.

use alloc::string::String;
use core::fmt::{Display, Write};

/// A JSON object under construction. Fields appear in the order of the calls.
#[derive(Debug)]
pub struct Object {
    text: String,
}

impl Object {
    /// An object whose first field is `"event": name`.
    #[must_use]
    pub fn event(name: &str) -> Self {
        Self::new().text("event", name)
    }

    /// An empty object.
    #[must_use]
    pub fn new() -> Self {
        Self { text: String::from("{") }
    }

    fn key(&mut self, key: &str) {
        if self.text.len() > 1 {
            self.text.push(',');
        }
        quote(&mut self.text, key);
        self.text.push(':');
    }

    /// Adds a string.
    #[must_use]
    pub fn text(mut self, key: &str, value: impl Display) -> Self {
        self.key(key);
        let mut plain = String::new();
        // Writing to a String does not fail.
        let _ = write!(plain, "{value}");
        quote(&mut self.text, &plain);
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn number(mut self, key: &str, value: impl Into<i128>) -> Self {
        self.key(key);
        let _ = write!(self.text, "{}", value.into());
        self
    }

    /// Adds a 64-bit word as a hexadecimal string (JSON numbers are only exact up to 2^53).
    #[must_use]
    pub fn hex(self, key: &str, value: u64) -> Self {
        self.text(key, format_args!("{value:#x}"))
    }

    /// Adds `true` or `false`.
    #[must_use]
    pub fn flag(mut self, key: &str, value: bool) -> Self {
        self.key(key);
        self.text.push_str(if value { "true" } else { "false" });
        self
    }

    /// Adds a list of objects.
    #[must_use]
    pub fn list(mut self, key: &str, items: impl IntoIterator<Item = Self>) -> Self {
        self.key(key);
        self.text.push('[');
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.text.push(',');
            }
            self.text.push_str(&item.finish());
        }
        self.text.push(']');
        self
    }

    /// Adds a list of pairs of numbers.
    #[must_use]
    pub fn pairs(mut self, key: &str, pairs: impl IntoIterator<Item = (u64, u64)>) -> Self {
        self.key(key);
        self.text.push('[');
        for (index, (first, second)) in pairs.into_iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            let _ = write!(self.text, "{comma}[{first},{second}]");
        }
        self.text.push(']');
        self
    }

    /// The text of the object, without a line end.
    #[must_use]
    pub fn finish(mut self) -> String {
        self.text.push('}');
        self.text
    }
}

impl Default for Object {
    fn default() -> Self {
        Self::new()
    }
}

fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{20}'..='\u{7e}' => out.push(c),
            // Everything else escaped: the line stays ASCII and stays one line. Characters beyond 16 bits are not expected here.
            c => {
                let _ = write!(out, "\\u{:04x}", u32::from(c).min(0xfffd));
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nested() {
        let line = Object::event("x")
            .number("n", -1)
            .flag("ok", true)
            .hex("h", u64::MAX)
            .list("l", [Object::new().number("a", 1u64), Object::new()])
            .pairs("p", [(1, 2), (3, 4)])
            .finish();
        assert_eq!(
            line,
            r#"{"event":"x","n":-1,"ok":true,"h":"0xffffffffffffffff","l":[{"a":1},{}],"p":[[1,2],[3,4]]}"#
        );
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "[\\x00-\\u{d7ff}]*") {
            let line = Object::new().text("k", &text).finish();
            prop_assert!(!line.contains('\n'));
            let value: serde_json::Value = serde_json::from_str(&line).expect("valid JSON");
            prop_assert_eq!(value["k"].as_str(), Some(text.as_str()));
        }
    }
}
