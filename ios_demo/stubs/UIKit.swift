// What the app uses of UIKit, for a type check on Linux.
@_exported import Darwin

@MainActor open class UIDevice: NSObject {
    public enum BatteryState: Int, Sendable {
        case unknown, unplugged, charging, full
    }

    public class var current: UIDevice { fatalError() }
    public var isBatteryMonitoringEnabled: Bool {
        get { fatalError() }
        set {}
    }
    public var batteryLevel: Float { fatalError() }
    public var batteryState: BatteryState { fatalError() }
}

@MainActor open class UIApplication: NSObject {
    public class var shared: UIApplication { fatalError() }
    public var isIdleTimerDisabled: Bool {
        get { fatalError() }
        set {}
    }
    public nonisolated class var didReceiveMemoryWarningNotification: Notification.Name { fatalError() }
}

@MainActor open class UIPasteboard: NSObject {
    public class var general: UIPasteboard { fatalError() }
    public var string: String? {
        get { fatalError() }
        set {}
    }
}

public enum UIAccessibility {
    public struct Notification: Sendable { public static let announcement = Self() }

    @MainActor public static func post(notification: Notification, argument: Any?) {}
}
