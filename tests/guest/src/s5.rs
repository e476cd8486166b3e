//! The one thing this guest wants to know from AML: the sleep type of S5 (ACPI 6.5, 7.4.2).

/// The first element of the package `_S5_` in a definition block: SLP_TYPa. Looks for the name rather than interpreting the block.
#[must_use]
pub fn sleep_type(aml: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"_S5_";
    const PACKAGE: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;

    let mut from = 0;
    loop {
        let at = from + aml.get(from..)?.windows(NAME.len()).position(|window| window == NAME)?;
        from = at + NAME.len();
        let Some((&PACKAGE, rest)) = aml[from..].split_first() else { continue };
        // The length's first byte says in its upper two bits how many follow; then the number of elements.
        let length_bytes = 1 + usize::from(*rest.first()? >> 6);
        match rest.get(length_bytes + 1..)? {
            [BYTE_PREFIX, value, ..] => return Some(*value),
            // ZeroOp, OneOp.
            [value @ (0 | 1), ..] => return Some(*value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_encodings() {
        // Name (_S5, Package () { 5 }) and, as SeaBIOS and others have it, with four elements and a root prefix.
        assert_eq!(sleep_type(b"\x08_S5_\x12\x04\x01\x0a\x05"), Some(5));
        assert_eq!(sleep_type(b"xx\x08\\_S5_\x12\x06\x04\x00\x00\x00\x00"), Some(0));
        // A mention elsewhere does not count; a two-byte length does.
        assert_eq!(sleep_type(b"_S5_ \x08_S5_\x12\x47\x00\x04\x01"), Some(1));
        assert_eq!(sleep_type(b"\x08_S4_\x12\x04\x01\x0a\x05"), None);
    }

    proptest! {
        #[test]
        fn any_block_is_survived(before: std::vec::Vec<u8>, after: std::vec::Vec<u8>) {
            let mut aml = before;
            aml.extend_from_slice(b"_S5_\x12");
            aml.extend(after);
            for len in 0..aml.len() {
                let _ = sleep_type(&aml[..len]);
            }
        }
    }
}
