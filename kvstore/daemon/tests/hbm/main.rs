//! Blocks in device memory, with a real daemon and processes that map its
//! chunks: over host memory that stands in for a device, and over the CUDA
//! code with a driver that stands in for NVIDIA's.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod apart;
#[path = "../common/mod.rs"]
mod common;
mod driver;
mod faults;
mod looked;
mod lost;
mod ways;

use std::path::Path;
use std::time::{Duration, Instant};

use common::lane::{Lane, map};
use common::{PATIENCE, Running, payload, socket};
use terrace_client::wire::{self, Tier};
use terrace_core::ByteCount;
use terrace_lane::Access;

/// Frames of a chunk of 4 MiB: blocks of 256 KiB, a header page each.
const FRAMES: u32 = 15;
const HOST_ONLY: &str = "[[hbm]]\ndevice = \"host-only\"\nbytes = \"16MiB\"\n";

impl Lane {
    async fn on_device(folder: &Path, device: u32) -> Self {
        let mut lane = Self::open(&socket(folder)).await;
        lane.want = Some(device);
        lane
    }

    /// The bytes of one grant, by the chunk's own descriptor, fence checked after use.
    async fn bytes_of(&mut self, grant: &wire::BlockGrant) -> Vec<u8> {
        let (data, fences, bytes, _) = self.descriptors(grant.chunk).await;
        let mapping = map(data, fences, bytes, Access::Read).unwrap();
        let length = usize::try_from(grant.length).unwrap();
        let mut found = vec![0; length];
        mapping.view(grant.offset, ByteCount::new(grant.length)).unwrap().copy_to(&mut found);
        assert_eq!(mapping.fence(grant.frame).map(terrace_core::Fence::get), Some(grant.fence));
        found
    }
}

/// Tier and device of each grant.
fn places(leased: &wire::LeaseResponse) -> Vec<(Tier, u32)> {
    leased.blocks.iter().map(|grant| (grant.tier(), grant.device)).collect()
}

fn all_on(leased: &wire::LeaseResponse, device: u32) -> bool {
    places(leased).iter().all(|place| *place == (Tier::Hbm, device))
}

fn all_pinned(leased: &wire::LeaseResponse) -> bool {
    leased.blocks.iter().all(|grant| grant.tier() == Tier::Pinned)
}

/// A device as `terrace info` shows it.
async fn device(daemon: &Running, number: u32) -> wire::TierInfo {
    let tiers = daemon.info().await.tiers.into_iter();
    tiers.filter(|tier| tier.tier() == Tier::Hbm).nth(usize::try_from(number).unwrap()).unwrap()
}

/// Waits until something holds of a device.
async fn until(daemon: &Running, what: &str, holds: impl Fn(&wire::TierInfo) -> bool) -> wire::TierInfo {
    let began = Instant::now();
    loop {
        let found = device(daemon, 0).await;
        if holds(&found) {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what} does not come: {found:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a device holds, and what lives on it, agree: nothing leaks there.
async fn assert_no_leak(daemon: &Running) {
    daemon.assert_quiet().await;
    until(daemon, "the end of everything on the device", |device| {
        let activity = device.activity.unwrap_or_default();
        let idle = activity.copies_queued + activity.copies_flying + activity.copies_held == 0;
        idle && activity.device_chunks == u64::from(device.chunks)
    })
    .await;
}

/// Blocks from a device read by hand are what was written.
async fn assert_exact(lane: &mut Lane, leased: &wire::LeaseResponse, keys: &[[u8; 4]]) {
    for (grant, key) in leased.blocks.iter().zip(keys) {
        assert!(lane.bytes_of(grant).await == payload(*key, 0), "{key:?} has other bytes");
    }
}
