import Foundation
import GemmaKit

/// The app's memory, and on a phone the memory that it may still use.
func memoryLine() -> String {
    String(format: "app %.0f MB · free %.0f MB", residentBytes() / 1e6, availableBytes() / 1e6)
}

/// What a report says of the device and of this build.
func describeDevice() -> [String: String] {
    let process = ProcessInfo.processInfo
    return [
        "system": process.operatingSystemVersionString,
        "model": modelName(),
        "memory_bytes": "\(process.physicalMemory)",
        "build": isDebug ? "debug" : "release",
    ]
}

#if DEBUG
let isDebug = true
#else
let isDebug = false
#endif

/// The hardware's name, such as iPhone17,1.
private func modelName() -> String {
    var system = utsname()
    uname(&system)
    return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}

/// What is sampled during a long benchmark.
func conditionNow() -> Condition { Condition(thermal: thermalState(), memoryBytes: residentBytes()) }

#if os(iOS) || GEMMA_STUBS
import UIKit

private func thermalState() -> String? {
    switch ProcessInfo.processInfo.thermalState {
    case .nominal: "nominal"
    case .fair: "fair"
    case .serious: "serious"
    case .critical: "critical"
    @unknown default: nil
    }
}

/// How hot the device is, and how full its battery.
@MainActor
func describeCondition() -> String {
    UIDevice.current.isBatteryMonitoringEnabled = true
    let thermal = thermalState() ?? "unknown"
    let level = UIDevice.current.batteryLevel  // negative if unknown
    let power = UIDevice.current.batteryState == .unplugged ? "on battery" : "plugged in"
    let saving = ProcessInfo.processInfo.isLowPowerModeEnabled ? ", low power mode" : ""
    return thermal + (level < 0 ? "" : String(format: ", %.0f %%, ", 100 * level) + power) + saving
}
#else
private func thermalState() -> String? { nil }

@MainActor
func describeCondition() -> String { "unknown" }
#endif
