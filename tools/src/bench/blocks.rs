//! Blocks that benchmarks put into a daemon.

use std::num::NonZero;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use terrace_client::{
    Durability, GetOptions, Outcome, ReadOptions, Session, Space, SpaceKind, SpaceManifest, Target, Verify,
    WriteOptions,
};
use terrace_core::{ByteCount, TokenCount, chain_keys};

use super::stand;

/// Payload of one SmolLM2-135M block of 16 tokens: 30 layers, K and V, 16
/// slots, 3 heads of 64 halves.
pub(super) const MODEL_BLOCK_BYTES: u64 = 30 * 2 * 16 * 3 * 64 * 2;
const _: () = assert!(MODEL_BLOCK_BYTES == 368_640);
/// Longest wait for frames or promotions.
pub(super) const WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// A session on the lane.
///
/// # Errors
/// When the daemon does not answer there.
pub(super) async fn session(socket: &Path) -> anyhow::Result<Session> {
    session_of(socket, stand::ADOPTING, None).await
}

/// A session on the lane for this tenant, which copies by so many threads; `None` is what clients do by themselves.
///
/// # Errors
/// When the daemon does not answer there.
pub(super) async fn session_of(
    socket: &Path,
    tenant: &str,
    copy_threads: Option<NonZero<usize>>,
) -> anyhow::Result<Session> {
    let target = Target {
        socket: Some(socket.to_owned()),
        grpc: None,
        tenant: tenant.to_owned(),
        token: String::new(),
        client_name: "terrace bench".to_owned(),
        answer_within: None,
        copy_threads,
    };
    Ok(Session::connect(&target).await?)
}

/// A space for blocks of this size that holds nothing of any model.
///
/// # Errors
/// When the daemon refuses it.
pub(super) async fn space(session: &Session, block_bytes: u64) -> anyhow::Result<Space> {
    let manifest = SpaceManifest {
        model: "bench".to_owned(),
        model_fingerprint: Vec::new(),
        weights_generation: 0,
        dtype: "f16".to_owned(),
        layout: "bytes".to_owned(),
        tokens_per_block: TokenCount::new(16),
        block_bytes: ByteCount::new(block_bytes),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".to_owned(),
        rank: 0,
        engine: "bench".to_owned(),
    };
    Ok(session.open_space(&manifest).await?)
}

/// Keys of chain number `chain` with this many blocks.
pub(super) fn keys(chain: u32, blocks: usize) -> Vec<[u8; 16]> {
    let tokens: Vec<u32> = (0..blocks).flat_map(|_| [chain; 16]).collect();
    chain_keys(&tokens, TokenCount::new(16))
}

/// Writes and seals these blocks, `payload` in each.
///
/// # Errors
/// When one is not granted or not sealed.
pub(super) async fn put(
    session: &Session,
    space: &Space,
    keys: &[[u8; 16]],
    payload: &[u8],
) -> anyhow::Result<()> {
    let options = WriteOptions { ttl: None, wait: WAIT };
    let mut lease = session.lease_write(space, keys, None, options).await?;
    let mut indexes = Vec::with_capacity(keys.len());
    for (index, grant) in (0u32..).zip(&mut lease.grants) {
        match grant {
            Outcome::Granted(block) => block.write(payload)?,
            Outcome::Exists => continue,
            Outcome::Promoting | Outcome::Missing(_) | Outcome::Throttled => {
                bail!("block {index} of {} was not granted for writing", keys.len())
            }
        }
        indexes.push(index);
    }
    lease.seal(&indexes, Durability::Readable).await?;
    lease.release().await?;
    Ok(())
}

/// Gets these blocks, one beside the other, into `target`.
///
/// # Errors
/// When one is not there.
pub(super) async fn get(
    session: &Session,
    space: &Space,
    keys: &[[u8; 16]],
    target: &mut [u8],
    verify: Verify,
) -> anyhow::Result<()> {
    let options = GetOptions { wait: WAIT, verify, ..GetOptions::default() };
    let mut places: Vec<&mut [u8]> = target.chunks_mut(usize::try_from(space.block_bytes().get())?).collect();
    for (index, outcome) in session.get(space, keys, &mut places, options).await?.iter().enumerate() {
        ensure!(outcome.granted().is_some(), "block {index} of {} is not there: {outcome:?}", keys.len());
    }
    Ok(())
}

/// Leases these blocks for reading and calls `each` with every one.
///
/// # Errors
/// When one is not there.
pub(super) async fn read(
    session: &Session,
    space: &Space,
    keys: &[[u8; 16]],
    mut each: impl FnMut(&terrace_client::ReadBlock) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let options = ReadOptions { wait: WAIT, ..ReadOptions::default() };
    let lease = session.lease_read(space, keys, options).await?;
    for (index, grant) in lease.grants.iter().enumerate() {
        let block = grant.granted();
        each(block.with_context(|| format!("block {index} of {} is not there: {grant:?}", keys.len()))?)?;
    }
    lease.release().await?;
    Ok(())
}
