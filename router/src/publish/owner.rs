//! Dynamo's id of a pool that outlives its workers.

use std::str::FromStr;

use serde_json::{Value, json};

/// Four ids that the operator chose, as Dynamo writes them: `SEMANTICS:SCOPE/DATACENTER/SLOT`, in lower-case
/// hexadecimal, of 16, 16, 8 and 16 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOwner {
    semantics: [u8; 16],
    scope: [u8; 16],
    datacenter: u64,
    slot: [u8; 16],
}

/// A text that is no such id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write it as SEMANTICS:SCOPE/DATACENTER/SLOT in lower-case hexadecimal: 32 digits, 32 digits, 16 digits and 32 digits"
)]
pub struct BadOwner;

impl FromStr for CacheOwner {
    type Err = BadOwner;

    fn from_str(text: &str) -> Result<Self, BadOwner> {
        let (semantics, rest) = text.split_once(':').ok_or(BadOwner)?;
        let (scope, rest) = rest.split_once('/').ok_or(BadOwner)?;
        let (datacenter, slot) = rest.split_once('/').ok_or(BadOwner)?;
        Ok(Self {
            semantics: bytes(semantics)?,
            scope: bytes(scope)?,
            datacenter: u64::from_be_bytes(bytes(datacenter)?),
            slot: bytes(slot)?,
        })
    }
}

fn bytes<const N: usize>(text: &str) -> Result<[u8; N], BadOwner> {
    let is_digit = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
    if text.len() != 2 * N || !text.bytes().all(is_digit) {
        return Err(BadOwner);
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| BadOwner)?;
    }
    Ok(bytes)
}

impl CacheOwner {
    /// In the form in which events carry it.
    pub(super) fn body(&self) -> Value {
        let explicit = |digest: &[u8; 16]| json!({"digest": digest, "source": "explicit"});
        json!({
            "pool": {
                "indexer_domain": {
                    "cache_semantics": explicit(&self.semantics),
                    "routing_scope": explicit(&self.scope),
                },
                "dc_id": self.datacenter,
            },
            "slot": explicit(&self.slot),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An id that is read wrongly would be another pool's, and Dynamo would credit nobody.
    #[test]
    fn ids_are_read_as_dynamo_writes_them() {
        let text =
            format!("{}:{}/{}/{}", "01".repeat(16), "02".repeat(16), "00000000000000ff", "0a".repeat(16));
        let body = text.parse::<CacheOwner>().unwrap().body();
        assert_eq!(body["pool"]["dc_id"], 255);
        assert_eq!(body["pool"]["indexer_domain"]["routing_scope"]["digest"][15], 2);
        assert_eq!(body["slot"], json!({"digest": vec![10; 16], "source": "explicit"}));
        for bad in
            ["", "a", &text[1..], &text.replace('a', "A"), &text.replace('/', ":"), &format!("{text}/0")]
        {
            assert!(bad.parse::<CacheOwner>().is_err(), "{bad}");
        }
    }
}
