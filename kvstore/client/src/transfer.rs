//! Whole blocks by value, over either transport. Every byte that comes out was
//! compared with its checksum in this process.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::Code;

use terrace_core::{BlockId, Checksum, Checksummer, Durability, MissReason, SealOutcome};
use terrace_lane::fold;
use terrace_proto::PIECE_BYTES;
use terrace_proto::v1::write_request::Part;
use terrace_proto::v1::{GrantOutcome, ReadRequest, ReadResponse, WriteHeader, WritePiece, WriteRequest};

use crate::convert::{durability_to_wire, parent_to_wire, reason_from_wire, seals_from_wire};
use crate::error::ClientError;
use crate::grpc::{ATTEMPTS_MAX, GrpcLink};
use crate::lease::{Outcome, millis};
use crate::put::Put;
use crate::read::ReadOptions;
use crate::session::{Backend, Session};
use crate::space::Space;

/// How long [`Session::read`] waits for blocks of slower tiers.
pub(crate) const READ_WAIT: Duration = Duration::from_secs(5);
/// How long [`Session::write`] waits for frames while the daemon is over a limit.
pub(crate) const WRITE_WAIT: Duration = Duration::from_secs(10);
const THROTTLED_DELAY: Duration = Duration::from_millis(20);
/// Bytes that one transfer pins at once.
const BATCH_BYTES: u64 = 32 << 20;
const PIECES_WAITING_MAX: usize = 4;

impl Session {
    /// Copies blocks out; `None` is a miss. Waits up to five seconds for blocks
    /// that come from a slower tier; what is not there by then is a miss.
    ///
    /// # Errors
    /// Bad keys; [`ClientError::Throttled`] if the daemon stays over a limit;
    /// the session has ended.
    pub async fn read(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        self.read_within(space, keys, READ_WAIT).await
    }

    /// As [`Session::read`], waiting for `wait` at most.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub async fn read_within(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        wait: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        let keys = self.keys(space, keys)?;
        let deadline = Instant::now() + wait;
        match &self.inner.backend {
            Backend::Grpc(link) => read_stream(link, space, &keys, wait).await,
            Backend::Lane(_) => {
                let mut found = Vec::with_capacity(keys.len());
                for batch in keys.chunks(batch_blocks(space)) {
                    found.extend(self.read_batch(space, batch, deadline).await?);
                }
                Ok(found)
            }
        }
    }

    async fn read_batch(
        &self,
        space: &Space,
        keys: &[Bytes],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        let bytes = block_bytes(space)?;
        let mut found = vec![None; keys.len()];
        let mut open: Vec<usize> = (0..keys.len()).collect();
        loop {
            let wanted: Vec<&Bytes> = open.iter().map(|index| &keys[*index]).collect();
            let wait = deadline.saturating_duration_since(Instant::now());
            let lease =
                self.lease_read(space, &wanted, ReadOptions { wait, ..ReadOptions::default() }).await?;
            let mut throttled = Vec::new();
            for (index, grant) in open.iter().zip(&lease.grants) {
                match grant {
                    Outcome::Granted(block) => {
                        let mut payload = vec![0; bytes];
                        match block.read_verified(&mut payload) {
                            Ok(()) => found[*index] = Some(payload),
                            Err(error) => tracing::warn!(block = %block.id(), %error, "counted as a miss"),
                        }
                    }
                    Outcome::Throttled => throttled.push(*index),
                    Outcome::Promoting | Outcome::Missing(_) | Outcome::Exists => {}
                }
            }
            lease.release().await?;
            if throttled.is_empty() {
                return Ok(found);
            }
            back_off(deadline).await?;
            open = throttled;
        }
    }

    /// Stores and seals blocks, each the child of the one before it, the first
    /// of `parent`. A block that is there already is not written again
    /// ([`SealOutcome::Already`]). When cancelled, some may have been sealed.
    ///
    /// # Errors
    /// Bad keys or payloads; [`ClientError::Throttled`] if the daemon stays over
    /// a limit; the session has ended. Some blocks may have been sealed.
    pub async fn write(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        payloads: &[impl AsRef<[u8]>],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        if keys.len() != payloads.len() {
            return Err(ClientError::Unpaired { keys: keys.len(), payloads: payloads.len() });
        }
        let payloads: Vec<&[u8]> = payloads.iter().map(AsRef::as_ref).collect();
        let expected = space.block_bytes().get();
        for (index, payload) in payloads.iter().enumerate() {
            let found = payload.len() as u64;
            if found != expected {
                return Err(ClientError::WrongLength { index, found, expected });
            }
        }
        match &self.inner.backend {
            Backend::Grpc(link) => {
                let keys = self.keys(space, keys)?;
                write_stream(link, space, &keys, parent_to_wire(parent)?, &payloads, durability).await
            }
            Backend::Lane(_) => {
                let put = Put { space, keys, parent, payloads: &payloads, durability };
                self.write_lane(&put).await
            }
        }
    }
}

pub(crate) async fn back_off(deadline: Instant) -> Result<(), ClientError> {
    if Instant::now() + THROTTLED_DELAY > deadline {
        return Err(ClientError::Throttled { message: "no room until the deadline".to_owned() });
    }
    tokio::time::sleep(THROTTLED_DELAY).await;
    Ok(())
}

pub(crate) fn batch_blocks(space: &Space) -> usize {
    let blocks = BATCH_BYTES / space.frame_bytes().get().max(1);
    usize::try_from(blocks).unwrap_or(usize::MAX).clamp(1, 1024)
}

fn index_u32(index: usize) -> Result<u32, ClientError> {
    u32::try_from(index).map_err(|_| ClientError::TooManyBlocks { found: index, limit: u32::MAX as usize })
}

fn block_bytes(space: &Space) -> Result<usize, ClientError> {
    usize::try_from(space.block_bytes().get())
        .map_err(|_| ClientError::Protocol { detail: "a block longer than this machine's memory" })
}

/// Whole blocks by value: `None` is a miss.
async fn read_stream(
    link: &GrpcLink,
    space: &Space,
    keys: &[Bytes],
    wait: Duration,
) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
    let bytes = block_bytes(space)?;
    let mut payloads: Vec<Vec<u8>> = vec![Vec::new(); keys.len()];
    let store = |at: usize, offset: usize, piece: &[u8]| {
        let payload = &mut payloads[at];
        if offset == 0 {
            payload.clear();
            payload.reserve_exact(bytes);
        }
        payload.extend_from_slice(piece);
    };
    let outcomes = stream_blocks(link, space, keys, wait, store).await?;
    let found = outcomes.iter().zip(payloads);
    Ok(found.map(|(outcome, payload)| outcome.granted().map(|()| payload)).collect())
}

/// Reads blocks, and gives each piece to `store` with its block's position and its place in the block: in order, and from
/// the beginning again when the stream is asked for again. Answers what became of each; what is `Granted` was given whole and
/// right.
pub(crate) async fn stream_blocks(
    link: &GrpcLink,
    space: &Space,
    keys: &[Bytes],
    wait: Duration,
    mut store: impl FnMut(usize, usize, &[u8]),
) -> Result<Vec<Outcome<()>>, ClientError> {
    let mut attempt = 1;
    loop {
        let request = ReadRequest { space: space.handle(), keys: keys.to_vec(), wait_ms: millis(wait) };
        let mut assembly = Assembly::new(space, keys, &mut store);
        match read_pieces(link, request, wait, &mut assembly).await? {
            Ok(()) => return assembly.finish(),
            Err(status) if status.code() == Code::Unavailable && attempt < ATTEMPTS_MAX => attempt += 1,
            Err(status) => return Err(link.failed(status)),
        }
    }
}

/// Takes pieces to the stream's end. A stream may last, but not stand still.
async fn read_pieces(
    link: &GrpcLink,
    request: ReadRequest,
    wait: Duration,
    assembly: &mut Assembly<'_, impl FnMut(usize, usize, &[u8])>,
) -> Result<Result<(), tonic::Status>, ClientError> {
    let mut pieces = match link.within(wait, link.read(request)).await? {
        Ok(pieces) => pieces,
        Err(status) => return Ok(Err(status)),
    };
    loop {
        match link.within(wait, pieces.message()).await? {
            Ok(Some(piece)) => assembly.take(&piece),
            Ok(None) => return Ok(Ok(())),
            Err(status) => return Ok(Err(status)),
        }
    }
}

/// Puts the pieces of a read stream together and judges them.
struct Assembly<'a, F> {
    space: &'a Space,
    keys: &'a [Bytes],
    blocks: Vec<Found>,
    store: F,
    wrong: Option<&'static str>,
    throttled: bool,
}

/// What is known of a block.
enum Found {
    Arriving(Box<Arriving>),
    Not(Outcome<()>),
}

/// A block whose pieces arrive. They are summed as they come, while they are in the cache.
struct Arriving {
    stored: u64,
    summer: Checksummer,
    sealed: Checksum,
}

impl<'a, F: FnMut(usize, usize, &[u8])> Assembly<'a, F> {
    fn new(space: &'a Space, keys: &'a [Bytes], store: F) -> Self {
        let blocks = keys.iter().map(|_| Found::Not(Outcome::Missing(MissReason::Unknown))).collect();
        Self { space, keys, blocks, store, wrong: None, throttled: false }
    }

    fn take(&mut self, piece: &ReadResponse) {
        let at = piece.index as usize;
        let Some(found) = self.blocks.get_mut(at) else {
            self.wrong = Some("a piece of a block that was not asked for");
            return;
        };
        match piece.outcome() {
            GrantOutcome::Granted => {}
            GrantOutcome::Throttled => {
                self.throttled = true;
                return;
            }
            GrantOutcome::Promoting => {
                *found = Found::Not(Outcome::Promoting);
                return;
            }
            GrantOutcome::Missing => {
                *found = Found::Not(Outcome::Missing(reason_from_wire(piece.reason())));
                return;
            }
            GrantOutcome::Exists | GrantOutcome::Unspecified => {
                self.wrong = Some("a piece of a read without an outcome");
                return;
            }
        }
        if let Found::Not(_) = found {
            *found = Found::Arriving(Box::new(Arriving::new(self.space, &self.keys[at])));
        }
        let Found::Arriving(arriving) = found else { return };
        match arriving.add(self.space, piece) {
            Some(offset) => (self.store)(at, offset, &piece.data),
            None => self.wrong = Some("pieces of a block with a gap or an overlap"),
        }
    }

    fn finish(self) -> Result<Vec<Outcome<()>>, ClientError> {
        if let Some(detail) = self.wrong {
            return Err(ClientError::Protocol { detail });
        }
        if self.throttled {
            return Err(ClientError::Throttled { message: "too many reads at once".to_owned() });
        }
        let bytes = self.space.block_bytes().get();
        let judged = self.blocks.into_iter().zip(self.keys).map(|(found, key)| match found {
            Found::Arriving(arriving) => arriving.judge(bytes, self.space.block_id(key)),
            Found::Not(outcome) => outcome,
        });
        Ok(judged.collect())
    }
}

impl Arriving {
    fn new(space: &Space, key: &[u8]) -> Self {
        let summer = Checksummer::new(space.block_id(key), space.block_bytes(), space.generation());
        Self { stored: 0, summer, sealed: Checksum::new(0) }
    }

    /// Where the next piece belongs; `None` if it is not the next one.
    fn add(&mut self, space: &Space, piece: &ReadResponse) -> Option<usize> {
        let end = self.stored.checked_add(piece.data.len() as u64)?;
        if piece.offset != self.stored || end > space.block_bytes().get() {
            return None;
        }
        fold::update(&mut self.summer, &piece.data);
        self.sealed = Checksum::new(piece.checksum);
        usize::try_from(std::mem::replace(&mut self.stored, end)).ok()
    }

    fn judge(self, bytes: u64, block: BlockId) -> Outcome<()> {
        // A short payload was cut off on the way: its fence moved.
        let whole = self.stored == bytes;
        if whole && self.summer.finish() == self.sealed {
            return Outcome::Granted(());
        }
        tracing::warn!(%block, whole, "counted as a miss: not the bytes that were sealed");
        Outcome::Missing(if whole { MissReason::Checksum } else { MissReason::Unknown })
    }
}

async fn write_stream(
    link: &GrpcLink,
    space: &Space,
    keys: &[Bytes],
    parent_key: Bytes,
    payloads: &[&[u8]],
    durability: Durability,
) -> Result<Vec<SealOutcome>, ClientError> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let header = WriteHeader {
        request_id: link.request_id(),
        space: space.handle(),
        keys: keys.to_vec(),
        parent_key,
        durability: durability_to_wire(durability),
    };
    let mut attempt = 1;
    loop {
        let (parts, queue) = mpsc::channel(PIECES_WAITING_MAX);
        let mut writing = pin!(link.write(queue));
        let (mut fed, mut answer) = (Ok(()), None);
        tokio::select! {
            early = &mut writing => answer = Some(early),
            done = feed(link, parts, header.clone(), space, payloads) => fed = done,
        }
        if let Err(error @ ClientError::NoAnswer { .. }) = fed {
            return Err(error);
        }
        let answer = match answer {
            Some(answer) => answer,
            None => link.within(WRITE_WAIT, writing).await?,
        };
        match answer {
            Ok(answer) => {
                let outcomes = seals_from_wire(answer.outcomes())?;
                if outcomes.len() != keys.len() {
                    return Err(ClientError::Protocol { detail: "a write that does not answer each block" });
                }
                return Ok(outcomes);
            }
            Err(status) if status.code() == Code::Unavailable && attempt < ATTEMPTS_MAX => attempt += 1,
            Err(status) => {
                // Who stopped listening says why.
                tracing::debug!(fed = fed.is_ok(), %status, "write stream failed");
                return Err(link.failed(status));
            }
        }
    }
}

async fn feed(
    link: &GrpcLink,
    parts: mpsc::Sender<WriteRequest>,
    header: WriteHeader,
    space: &Space,
    payloads: &[&[u8]],
) -> Result<(), ClientError> {
    let keys = header.keys.clone();
    let send = async |part| {
        let sent = link.within(WRITE_WAIT, parts.send(WriteRequest { part: Some(part) })).await?;
        sent.map_err(|_| ClientError::Disconnected)
    };
    send(Part::Header(header)).await?;
    for (at, payload) in payloads.iter().enumerate() {
        let index = index_u32(at)?;
        let sum = fold::checksum(space.block_id(&keys[at]), space.generation(), payload).get();
        let mut offset = 0;
        for piece in payload.chunks(PIECE_BYTES) {
            let end = offset + piece.len();
            let checksum = (end == payload.len()).then_some(sum);
            let data = Bytes::copy_from_slice(piece);
            send(Part::Piece(WritePiece { index, offset: offset as u64, data, checksum })).await?;
            offset = end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use terrace_core::{ByteCount, SpaceKind, SpaceManifest, TenantId, TokenCount};
    use terrace_proto::v1::{self, OpenSpaceResponse};

    use super::*;

    const PAYLOAD: &[u8] = b"ten bytes.";
    const KEY: &[u8] = b"key";

    fn space() -> Space {
        let manifest = SpaceManifest {
            model: "model".to_owned(),
            model_fingerprint: Vec::new(),
            weights_generation: 0,
            dtype: "f16".to_owned(),
            layout: "layer,kv".to_owned(),
            tokens_per_block: TokenCount::new(16),
            block_bytes: ByteCount::new(PAYLOAD.len() as u64),
            kind: SpaceKind::Chain,
            group: 0,
            topology: "canonical".to_owned(),
            rank: 0,
            engine: "terrace".to_owned(),
        };
        let tenant = TenantId::from_bytes([3; 16]);
        let answer = OpenSpaceResponse {
            tenant_key: vec![1; 32].into(),
            tenant_id: tenant.to_bytes().to_vec().into(),
            space_id: manifest.space_id(tenant).to_bytes().to_vec().into(),
            ..OpenSpaceResponse::default()
        };
        Space::new(1, &manifest, &answer).unwrap()
    }

    /// What becomes of one block, and what was stored of it.
    fn read(pieces: &[ReadResponse]) -> (Result<Outcome<()>, ClientError>, Vec<u8>) {
        let (space, keys, mut stored) = (space(), [Bytes::from_static(KEY)], vec![0; PAYLOAD.len()]);
        let store = |at: usize, offset: usize, piece: &[u8]| {
            assert_eq!(at, 0);
            stored[offset..offset + piece.len()].copy_from_slice(piece);
        };
        let mut assembly = Assembly::new(&space, &keys, store);
        pieces.iter().for_each(|piece| assembly.take(piece));
        let outcomes = assembly.finish();
        (outcomes.map(|mut outcomes| outcomes.remove(0)), stored)
    }

    fn piece(offset: usize, data: &'static [u8]) -> ReadResponse {
        let space = space();
        ReadResponse {
            outcome: GrantOutcome::Granted.into(),
            offset: offset as u64,
            length: PAYLOAD.len() as u64,
            checksum: fold::checksum(space.block_id(KEY), space.generation(), PAYLOAD).get(),
            data: Bytes::from_static(data),
            ..ReadResponse::default()
        }
    }

    // Whoever sends what it likes must not have it taken for the block, nor written beside its target.
    #[test]
    fn a_stream_is_the_block_or_a_miss_or_an_error() {
        let whole = read(&[piece(0, b"ten "), piece(4, b"bytes.")]);
        assert_eq!((whole.0.unwrap(), &whole.1[..]), (Outcome::Granted(()), PAYLOAD));
        let missing = |reason| Outcome::Missing(reason);
        assert_eq!(read(&[]).0.unwrap(), missing(MissReason::Unknown));
        assert_eq!(read(&[piece(0, b"ten ")]).0.unwrap(), missing(MissReason::Unknown));
        assert_eq!(read(&[piece(0, b"ten Bytes.")]).0.unwrap(), missing(MissReason::Checksum));
        let told = |outcome: GrantOutcome, reason: v1::MissReason| {
            let (outcome, reason) = (outcome.into(), reason.into());
            read(&[ReadResponse { outcome, reason, ..ReadResponse::default() }]).0
        };
        assert_eq!(told(GrantOutcome::Promoting, v1::MissReason::Unspecified).unwrap(), Outcome::Promoting);
        assert_eq!(told(GrantOutcome::Missing, v1::MissReason::Device).unwrap(), missing(MissReason::Device));
        let throttled = told(GrantOutcome::Throttled, v1::MissReason::Unspecified);
        assert!(matches!(throttled, Err(ClientError::Throttled { .. })), "{throttled:?}");
        let bad = [
            vec![piece(0, b"ten bytes.."), piece(0, PAYLOAD)],
            vec![piece(0, b"ten "), piece(3, b"bytes.")],
            vec![piece(4, b"bytes."), piece(0, PAYLOAD)],
            vec![piece(0, PAYLOAD), piece(0, PAYLOAD)],
            vec![piece(usize::MAX, b"x")],
            vec![ReadResponse { index: 1, ..piece(0, PAYLOAD) }],
            vec![ReadResponse::default()],
        ];
        for pieces in bad {
            let (found, _) = read(&pieces);
            assert!(matches!(found, Err(ClientError::Protocol { .. })), "{found:?}");
        }
    }
}
