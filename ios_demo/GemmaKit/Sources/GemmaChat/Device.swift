import Foundation
import GemmaKit

/// The app's memory, and on a phone the memory that it may still use.
func memoryLine() -> String {
    String(format: "app %.0f MB · free %.0f MB", residentBytes() / 1e6, availableBytes() / 1e6)
}

/// What a report says of the device and of this build.
func describeDevice() -> [String: String] {
    let process = ProcessInfo.processInfo
    var told = [
        "system": process.operatingSystemVersionString,
        "model": modelName(),
        "memory_bytes": "\(process.physicalMemory)",
        "build": isDebug ? "debug" : "release",
    ]
    told["app"] = Bundle.main.infoDictionary?["CFBundleShortVersionString"] as? String
    return told
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

/// What changes while the app measures; `moment` begins the names, which are those of the Android app.
@MainActor
func describeCondition(_ moment: String) -> [String: String] {
    UIDevice.current.isBatteryMonitoringEnabled = true
    var told = ["power_save": "\(ProcessInfo.processInfo.isLowPowerModeEnabled)"]
    told["thermal_status"] = thermalState()
    let level = UIDevice.current.batteryLevel  // negative if unknown
    if level >= 0 {
        told["battery_percent"] = String(format: "%.0f", 100 * level)
        told["charging"] = "\(UIDevice.current.batteryState != .unplugged)"
    }
    return Dictionary(uniqueKeysWithValues: told.map { ("\(moment)_\($0.key)", $0.value) })
}
#else
private func thermalState() -> String? { nil }

@MainActor
func describeCondition(_ moment: String) -> [String: String] { [:] }
#endif
