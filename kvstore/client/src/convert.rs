//! Between wire messages and the types of this library, each once.

use bytes::Bytes;

use terrace_core::{Durability, MatchMode, MissReason, Purpose, SealOutcome};
use terrace_proto::{KEY_BYTES_MAX, v1};

use crate::error::ClientError;

/// Keys as the wire carries them.
pub(crate) fn keys_to_wire<K: AsRef<[u8]>>(keys: &[K], limit: usize) -> Result<Vec<Bytes>, ClientError> {
    if keys.len() > limit {
        return Err(ClientError::TooManyBlocks { found: keys.len(), limit });
    }
    // All in one piece of memory, of which each is a part.
    let mut all = Vec::with_capacity(keys.iter().map(|key| key.as_ref().len()).sum());
    for (index, key) in keys.iter().map(AsRef::as_ref).enumerate() {
        let found = key.len();
        if found == 0 || found > KEY_BYTES_MAX {
            return Err(ClientError::BadKey { index, found, limit: KEY_BYTES_MAX });
        }
        all.extend_from_slice(key);
    }
    let mut all = Bytes::from(all);
    Ok(keys.iter().map(|key| all.split_to(key.as_ref().len())).collect())
}

/// A parent key: empty where there is none.
pub(crate) fn parent_to_wire(parent: Option<&[u8]>) -> Result<Bytes, ClientError> {
    match parent {
        None => Ok(Bytes::new()),
        Some(key) => Ok(keys_to_wire(&[key], 1)?.swap_remove(0)),
    }
}

pub(crate) fn mode_to_wire(mode: MatchMode) -> i32 {
    match mode {
        MatchMode::Prefix => v1::MatchMode::Prefix.into(),
        MatchMode::Set => v1::MatchMode::Set.into(),
    }
}

pub(crate) fn purpose_to_wire(purpose: Purpose) -> v1::LeasePurpose {
    match purpose {
        Purpose::Prefill => v1::LeasePurpose::Prefill,
        Purpose::Decode => v1::LeasePurpose::Decode,
    }
}

pub(crate) fn durability_to_wire(durability: Durability) -> i32 {
    match durability {
        Durability::Readable => v1::Durability::Unspecified.into(),
        Durability::Durable => v1::Durability::Durable.into(),
    }
}

pub(crate) fn reason_from_wire(reason: v1::MissReason) -> MissReason {
    match reason {
        v1::MissReason::Unspecified | v1::MissReason::Unknown => MissReason::Unknown,
        v1::MissReason::Filling => MissReason::Filling,
        v1::MissReason::Checksum => MissReason::Checksum,
        v1::MissReason::Device => MissReason::Device,
        v1::MissReason::CheaperToRecompute => MissReason::CheaperToRecompute,
    }
}

pub(crate) fn seals_from_wire(
    outcomes: impl Iterator<Item = v1::SealOutcome>,
) -> Result<Vec<SealOutcome>, ClientError> {
    let known = outcomes.map(|outcome| match outcome {
        v1::SealOutcome::Unspecified => Err(ClientError::Protocol { detail: "a seal without an outcome" }),
        v1::SealOutcome::Sealed => Ok(SealOutcome::Sealed),
        v1::SealOutcome::Already => Ok(SealOutcome::Already),
        v1::SealOutcome::Conflict => Ok(SealOutcome::Conflict),
        v1::SealOutcome::Lost => Ok(SealOutcome::Lost),
        v1::SealOutcome::NotDurable => Ok(SealOutcome::NotDurable),
    });
    known.collect()
}

/// 16 bytes of a wire field.
pub(crate) fn id_from_wire(bytes: &[u8], detail: &'static str) -> Result<[u8; 16], ClientError> {
    bytes.try_into().map_err(|_| ClientError::Protocol { detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Keys at the edges of what is allowed, and too many of them.
    #[test]
    fn keys_are_checked_before_they_are_sent() {
        let found = keys_to_wire(&[vec![1u8; 1], vec![2; 64]], 2).unwrap();
        assert_eq!(found.iter().map(Bytes::len).collect::<Vec<_>>(), [1, 64]);
        assert!(matches!(keys_to_wire(&[b""], 2), Err(ClientError::BadKey { found: 0, .. })));
        assert!(matches!(keys_to_wire(&[[0u8; 65]], 2), Err(ClientError::BadKey { found: 65, .. })));
        assert!(matches!(
            keys_to_wire(&[b"k"; 3], 2),
            Err(ClientError::TooManyBlocks { found: 3, limit: 2 })
        ));
        assert!(parent_to_wire(None).unwrap().is_empty());
        assert!(parent_to_wire(Some(b"")).is_err(), "an empty parent would mean none");
    }
}
