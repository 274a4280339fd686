//! Numbers as protobuf writes them, for messages that are read by hand.

/// The next number, of the bytes that `next` brings. `None` where they end too early, or the number needs more than 64 bits.
#[inline(always)]
pub fn varint(mut next: impl FnMut() -> Option<u8>) -> Option<u64> {
    let mut number = 0;
    for place in 0..10 {
        let byte = next()?;
        // The tenth has room for one bit.
        if place == 9 && byte > 1 {
            return None;
        }
        number |= u64::from(byte & 0x7F) << (7 * place);
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use prost::encoding::{decode_varint, encode_varint};

    use super::*;

    /// A number that is read otherwise than by the generated code would be another block's place or length: numbers of
    /// every length, the ends of each, and bytes that are none.
    #[test]
    fn numbers_are_read_as_the_generated_code_reads_them() {
        let mut samples: Vec<Vec<u8>> =
            vec![vec![], vec![0x80; 9], vec![0x80; 11], [&[0xFF; 9][..], &[1]].concat()];
        samples.extend([[&[0xFF; 9][..], &[2]].concat(), [&[0x80; 9][..], &[0, 7]].concat(), vec![0x80, 0]]);
        for bits in 0..64 {
            for number in [1u64 << bits, (1 << bits) - 1, u64::MAX >> bits] {
                let mut bytes = Vec::new();
                encode_varint(number, &mut bytes);
                bytes.push(9);
                samples.push(bytes);
            }
        }
        for bytes in samples {
            let (mut ours, mut theirs) = (bytes.iter(), &bytes[..]);
            let found = varint(|| ours.next().copied());
            assert_eq!(found, decode_varint(&mut theirs).ok(), "{bytes:?}");
            assert!(found.is_none() || ours.as_slice() == theirs, "{bytes:?}: as many bytes are taken");
        }
    }
}
