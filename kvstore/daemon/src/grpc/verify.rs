//! One block under the glass: its copies as they are, and whether their bytes match.

use std::os::unix::fs::FileExt;
use std::path::Path;

use terrace_core::{BlockHeader, BlockId, BlockView, Checksum, Checksummer, Fence, FrameRef, HbmCopyView};
use terrace_lane::fold;
use terrace_media::{MediaFacts, PAGE_BYTES, decode_header};
use terrace_proto::v1;

use crate::convert;
use crate::engine::Engine;
use crate::hbm::Hbm;

/// Bytes read from a device at once.
const PIECE_BYTES: usize = 1 << 20;

/// A block for the wire.
pub(super) fn stat(view: &BlockView, facts: &MediaFacts, hbm: &Hbm) -> v1::StatBlockResponse {
    let on_devices = view.hbm.iter().map(|copy| v1::BlockCopy {
        tier: v1::Tier::Hbm.into(),
        device: hbm.name(copy.gpu),
        chunk: copy.frame.chunk.get(),
        frame: copy.frame.index,
        offset: 0,
        state: "sealed".to_owned(),
        verified: copy.verified,
        pins: copy.pins,
    });
    let mut copies: Vec<_> = on_devices.collect();
    if let Some(frame) = view.frame.filter(|_| view.tiers.pinned) {
        copies.push(v1::BlockCopy {
            tier: v1::Tier::Pinned.into(),
            device: "memory".to_owned(),
            chunk: frame.chunk.get(),
            frame: frame.index,
            offset: 0,
            state: "sealed".to_owned(),
            verified: view.verified,
            pins: view.pins,
        });
    }
    if let Some((frame, offset)) = view.disk {
        let device = facts.devices.get(usize::from(frame.device.get()));
        copies.push(v1::BlockCopy {
            tier: v1::Tier::Nvme.into(),
            device: device.map(|device| device.path.display().to_string()).unwrap_or_default(),
            chunk: frame.slot.into(),
            frame: frame.index,
            offset,
            state: "sealed".to_owned(),
            verified: false,
            pins: 0,
        });
    }
    let mut explanation = vec![view.explanation.to_owned()];
    if view.filling > 0 {
        explanation.push(format!("{} frames are being filled for it", view.filling));
    }
    if view.busy > 0 {
        explanation.push(format!("{} operations read from its frame", view.busy));
    }
    v1::StatBlockResponse {
        present: view.tiers.is_in_memory() || view.tiers.nvme,
        space_id: convert::space_bytes(view.space),
        parent_id: view.parent.map(convert::block_bytes).unwrap_or_default(),
        length: view.header.map_or(0, |header| header.length.get()),
        checksum: view.header.map_or(0, |header| header.checksum.get()),
        copies,
        leases: view.leases.iter().map(|lease| lease.get()).collect(),
        children_pinned: view.children_pinned,
        children_nvme: view.children_nvme,
        idle_ms: view.idle.millis(),
        explanation,
    }
}

/// Goes over every copy. Blocks for as long as that takes.
pub(super) fn verify(engine: &Engine, block: BlockId) -> Vec<v1::VerifiedCopy> {
    let Some(view) = engine.view(|core| core.stat(block)) else { return Vec::new() };
    let Some(header) = view.header else { return Vec::new() };
    let mut copies = Vec::new();
    for copy in &view.hbm {
        let found = in_hbm(engine.hbm(), copy, &header);
        copies.push(verified(v1::Tier::Hbm, &header, found));
    }
    if let (Some(frame), Some(fence), true) = (view.frame, view.fence, view.tiers.pinned) {
        let found = in_memory(engine, frame, fence, &header);
        copies.push(verified(v1::Tier::Pinned, &header, found));
    }
    if let Some((frame, offset)) = view.disk {
        let facts = engine.media().facts();
        let found = match facts.devices.get(usize::from(frame.device.get())) {
            Some(device) => on_device(&device.path, offset, &header),
            None => Err("the device is not configured any more".to_owned()),
        };
        // An evicted block's frame may hold another one by now, which is no damage.
        let still = engine.view(|core| core.stat(block)).and_then(|view| view.disk);
        let found = found.map_err(|detail| {
            if still == Some((frame, offset)) {
                detail
            } else {
                "it moved while it was read; ask again".to_owned()
            }
        });
        copies.push(verified(v1::Tier::Nvme, &header, found));
    }
    copies
}

fn verified(tier: v1::Tier, header: &BlockHeader, found: Result<Checksum, String>) -> v1::VerifiedCopy {
    let expected = header.checksum;
    let (found, detail) = match found {
        Ok(found) if found == expected => (found, String::new()),
        Ok(found) => (found, "the bytes do not match the checksum that was sealed".to_owned()),
        Err(detail) => (Checksum::new(0), detail),
    };
    v1::VerifiedCopy {
        tier: tier.into(),
        ok: detail.is_empty(),
        expected: expected.get(),
        found: found.get(),
        detail,
    }
}

/// What another client may have stored since is what is found: device memory has no write protection.
fn in_hbm(hbm: &Hbm, copy: &HbmCopyView, header: &BlockHeader) -> Result<Checksum, String> {
    let moved = || "it moved while it was read; ask again".to_owned();
    let taken = hbm.snapshot(copy.gpu, copy.frame, header.length).ok_or_else(moved)?;
    let failed = |error| format!("cannot read {}: {error}", hbm.name(copy.gpu));
    let (bytes, fence) = taken.map_err(failed)?;
    let mut summer = Checksummer::new(header.block, header.length, header.generation);
    fold::update(&mut summer, &bytes);
    if fence == copy.fence { Ok(summer.finish()) } else { Err(moved()) }
}

fn in_memory(
    engine: &Engine,
    frame: FrameRef,
    fence: Fence,
    header: &BlockHeader,
) -> Result<Checksum, String> {
    let moved = || "it moved while it was read; ask again".to_owned();
    let memory = engine.chunk(frame.chunk).ok_or_else(moved)?;
    let found = memory.checksum(frame.index, header).map_err(|outside| outside.to_string())?;
    if memory.fence(frame.index) == fence { Ok(found) } else { Err(moved()) }
}

fn on_device(path: &Path, offset: u64, header: &BlockHeader) -> Result<Checksum, String> {
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut piece = vec![0; PIECE_BYTES];
    let page = &mut piece[..usize::try_from(PAGE_BYTES).unwrap_or(4096)];
    file.read_exact_at(page, offset).map_err(failed)?;
    let stored = decode_header(page).map_err(|bad| format!("its header page: {bad}"))?;
    if (stored.block, stored.checksum, stored.length) != (header.block, header.checksum, header.length) {
        return Err(format!(
            "its header page names block {} with {} bytes",
            stored.block,
            stored.length.get()
        ));
    }
    let mut summer = Checksummer::new(header.block, header.length, header.generation);
    let (mut at, end) = (offset + PAGE_BYTES, offset + PAGE_BYTES + header.length.get());
    while at < end {
        let bytes = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        file.read_exact_at(&mut piece[..bytes], at).map_err(failed)?;
        fold::update(&mut summer, &piece[..bytes]);
        at += bytes as u64;
    }
    Ok(summer.finish())
}
